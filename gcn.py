"""Report graphs and the two-layer graph convolutional network of Sec. 4.3.

Copy this file; it needs torch alone. A report's RadGraph record is a small undirected graph
(`read_radgraph`), many of them one batch (`collate_graphs`), and `GCN` gives a vector per graph:

    H1 = ReLU(A_hat X W1 + b1)
    H2 = A_hat H1 W2 + b2                  A_hat = D^-1/2 (A + I) D^-1/2
    G  = mean over the graph's rows of H2  D = row sums of A + I

Kipf & Welling (2017), which the paper's reference [37] uses as well. RadGraph's polarity lives in
the node label alone ("pneumothorax" is the same phrase whether present or absent), so a caller
appends the label's one-hot to each node's features.

Symbols: V nodes of all graphs, Q graphs, F input features, nnz entries of A + I that are not 0.

SPDX-License-Identifier: MIT
"""

import torch
from torch import nn

NODE_LABELS = ("ANAT-DP", "OBS-DP", "OBS-U", "OBS-DA")  # RadGraph 1.0's names, our one-hot's order


class GraphError(ValueError):
    """A record that is no RadGraph record. It names an entity by its place, never by its words."""


class GCN(nn.Module):
    """Two graph convolutions, ReLU between them, then the mean over each graph's nodes (Sec. 4.3).

    in_features, hidden_features, out_features: widths F -> hidden -> out.
    """

    def __init__(self, in_features, hidden_features, out_features):
        super().__init__()
        self.layer1 = nn.Linear(in_features, hidden_features)
        self.layer2 = nn.Linear(hidden_features, out_features)
        for layer in (self.layer1, self.layer2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, graphs):
        """Encode a batch of graphs, outside autocast: all numbers in the weights' precision.

        x: (V, F) features of all graphs' nodes. graphs: of `collate_graphs`, on x's device.
        Returns (Q, out_features). Torch raises for shapes that do not fit.
        """
        target, source = graphs["a_indices"]                                       # (nnz,) each
        a_hat = graphs["a_values"].to(x.dtype)[:, None]                            # (nnz, 1)
        sizes = graphs["sizes"][:, None]                                           # (Q, 1)
        with torch.autocast(x.device.type, enabled=False):
            xw = x @ self.layer1.weight.T                                          # (V, hidden)
            messages = a_hat * xw.index_select(0, source)                          # (nnz, hidden)
            h1 = torch.zeros_like(xw).index_add(0, target, messages)               # (V, hidden)
            h1 = torch.relu(h1 + self.layer1.bias)                                 # (V, hidden)
            # W2 and b2 commute with the mean, so that messages go straight to their graph's sum.
            messages = a_hat * h1.index_select(0, source)                          # (nnz, hidden)
            graph = graphs["graph_index"][target]                                  # (nnz,)
            total = h1.new_zeros(len(sizes), h1.shape[1]).index_add(0, graph, messages)
            return self.layer2(total / sizes)                                      # (Q, out)


def collate_graphs(records):
    """Join a list of RadGraph records into one batch: all that needs no weights, on the CPU.

    Returns "phrases": the batch's distinct phrases, in lower case; "node": (V,) int64 index into
    them, -1 for the one empty node of a report without entities; "label": (V,) int64 index into
    NODE_LABELS, 0 for the empty node; "a_indices": (2, nnz) int64 and "a_values": (nnz,) float32
    of A_hat; "graph_index": (V,) int64, each node's graph; "sizes": (Q,) float32, nodes of each.
    Raises GraphError.
    """
    phrase_index = {}
    node, label, graph_index, pairs = [], [], [], []
    for g, record in enumerate(records):
        phrases, labels, edges = read_radgraph(record)
        first = len(node)
        for phrase in phrases:
            node.append(phrase_index.setdefault(phrase.lower(), len(phrase_index)))
        label += [NODE_LABELS.index(name) for name in labels]
        if not phrases:
            node.append(-1)
            label.append(0)
        graph_index += [g] * (len(node) - first)
        pairs += [(first + i, first + j) for i, j in edges]
    # ASSUMPTION: relations are undirected, their names unused; a graph is its nodes' mean.
    pairs += [(j, i) for i, j in pairs] + [(i, i) for i in range(len(node))]  # A + I
    # Sorted; an edge given twice or both ways, or a self loop in the data, counts once.
    a_indices = torch.tensor(sorted(set(pairs))).T.contiguous()                    # (2, nnz)
    degree = a_indices[0].bincount().float()                                       # (V,)
    return {
        "phrases": list(phrase_index),
        "node": torch.tensor(node),                                                # (V,)
        "label": torch.tensor(label),                                              # (V,)
        "a_indices": a_indices,
        "a_values": degree[a_indices].prod(0).rsqrt(),                             # (nnz,)
        "graph_index": torch.tensor(graph_index),                                  # (V,)
        "sizes": torch.tensor(graph_index).bincount().float(),                     # (Q,)
    }


def read_radgraph(record):
    """Read one RadGraph record as a graph.

    record: {"text": ..., "entities": {"1": {"tokens", "label", "relations": [[name, "2"], ...]}}},
        bare or as the only value of a mapping (the `radgraph` package's {"0": {...}}, PhysioNet's
        {"p10/p10000032/s50414267.txt": {...}}); {} and {"entities": {}} are empty graphs.
    Returns phrases (V), labels (V) out of NODE_LABELS, edges as index pairs, one per relation.
    Raises GraphError for anything else, for unknown labels and relations to unknown entities.
    Source: Jain et al., RadGraph (2021), https://physionet.org/content/radgraph/1.0.0/.
    """
    entities = _entities(record)
    index = {key: i for i, key in enumerate(entities)}
    phrases, labels, edges = [], [], []
    for i, entity in enumerate(entities.values()):
        where = f"RadGraph entity {i + 1}"
        if not isinstance(entity, dict) or not isinstance(entity.get("tokens"), str):
            raise GraphError(f"{where}: expected an object with text in tokens")
        label = _node_label(str(entity.get("label")))
        if label is None:
            raise GraphError(f"{where}: expected a label of RadGraph or of RadGraph-XL")
        phrases.append(entity["tokens"])
        labels.append(label)
        try:
            edges += [(i, index[target]) for _, target in entity.get("relations", [])]
        except (KeyError, TypeError, ValueError):
            raise GraphError(f"{where}: expected relations as a list of [name, entity of the "
                             "record]") from None
    return phrases, labels, edges


def _entities(record):
    """The entities of a record, which may be the only value of a mapping."""
    if isinstance(record, dict) and len(record) == 1 and "entities" not in record:
        record = next(iter(record.values()))
    if record == {}:
        return {}
    if not isinstance(record, dict) or not isinstance(record.get("entities"), dict):
        raise GraphError("expected a RadGraph record, an object with entities by name")
    return record["entities"]


def _node_label(label):
    """One of NODE_LABELS for either style ("OBS-DA", "Observation::definitely absent"), or None."""
    # ASSUMPTION: measurements and uncertain anatomy count as present.
    if label == "ANAT-U" or label.startswith("Anatomy::"):
        return "ANAT-DP"
    if label.startswith("Observation::measurement::"):
        return "OBS-DP"
    if label in NODE_LABELS:
        return label
    return XL_LABELS.get(label)


XL_LABELS = {
    "Observation::definitely present": "OBS-DP",
    "Observation::uncertain": "OBS-U",
    "Observation::definitely absent": "OBS-DA",
}
