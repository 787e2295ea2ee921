"""Report graphs and the two-layer graph convolutional network of Sec. 4.3.

Copy this file; it needs torch alone. A report's RadGraph record becomes a small undirected graph
(`read_radgraph`), many of them one batch (`collate_graphs`), and `GCN` one vector per graph:

    H1 = ReLU(A_hat X W1 + b1)
    H2 = A_hat H1 W2 + b2                  A_hat = D^-1/2 (A + I) D^-1/2
    g  = mean over the V nodes of H2       D = row sums of A + I

Kipf & Welling (2017), which the paper's reference [37] uses as well. RadGraph's polarity lives in
the node label alone ("pneumothorax" is the same phrase whether present or absent), so a caller
appends the label's one-hot to each node's features.

Symbols: V nodes, E edges, G graphs, P nodes of the largest graph, F input features.

SPDX-License-Identifier: MIT
"""

import torch
from torch import nn

NODE_LABELS = ("ANAT-DP", "OBS-DP", "OBS-U", "OBS-DA")  # RadGraph 1.0's names, our one-hot's order
_XL_OBSERVATIONS = {
    "definitely present": "OBS-DP", "uncertain": "OBS-U", "definitely absent": "OBS-DA"}


def _node_label(label: str) -> str | None:
    """One of NODE_LABELS for either style ("OBS-DA", "Observation::definitely absent"), or None."""
    if label in NODE_LABELS:
        return label
    kind, *detail = str(label).split("::")
    # ASSUMPTION: measurements and uncertain anatomy count as present.
    if kind in ("Anatomy", "ANAT-U"):
        return "ANAT-DP"
    if kind == "Observation" and "measurement" in detail:
        return "OBS-DP"
    return _XL_OBSERVATIONS.get(detail[-1]) if kind == "Observation" and detail else None


def read_radgraph(record: dict) -> tuple[list[str], list[str], list[tuple[int, int]]]:
    """Read one RadGraph record as a graph.

    record: {"text": ..., "entities": {"1": {"tokens", "label", "relations": [[name, "2"], ...]}}},
        bare or as the only value of a mapping (the `radgraph` package's {"0": {...}}, PhysioNet's
        {"p10/p10000032/s50414267.txt": {...}}); {} and a record without entities are empty graphs.
    Returns phrases (V), labels (V) out of NODE_LABELS, edges as index pairs, one per relation.
    Raises ValueError naming the entity for an unknown label or a relation to an unknown entity.
    Source: Jain et al., RadGraph (2021), https://physionet.org/content/radgraph/1.0.0/.
    """
    if "entities" not in record and len(record) == 1:
        inner = next(iter(record.values()))
        record = inner if isinstance(inner, dict) else record
    entities = record.get("entities") or {}
    if not isinstance(entities, dict):
        raise ValueError(f"RadGraph record: expected entities by name, got a "
                         f"{type(entities).__name__}")
    index = {name: i for i, name in enumerate(entities)}
    phrases, labels, edges = [], [], []
    for name, entity in entities.items():
        if not isinstance(entity, dict) or not isinstance(entity.get("tokens"), str):
            raise ValueError(f"RadGraph entity {name!r}: expected an object with text in tokens")
        label = _node_label(entity.get("label"))
        if label is None:
            raise ValueError(f"RadGraph entity {name!r}: unknown label {entity.get('label')!r}, "
                             f"expected one of {', '.join(NODE_LABELS)} or RadGraph-XL's names")
        phrases.append(entity["tokens"])
        labels.append(label)
        for pair in entity.get("relations") or ():
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise ValueError(f"RadGraph entity {name!r}: expected relations as [name, entity]")
            relation, target = pair
            if target not in index:
                raise ValueError(f"RadGraph entity {name!r}: relation {relation!r} points to "
                                 f"unknown entity {target!r}")
            edges.append((index[name], index[target]))
    return phrases, labels, edges


def collate_graphs(records: list[dict]) -> dict:
    """Join RadGraph records into one batch, each distinct phrase listed once.

    Returns "phrases": the distinct phrases; "node": (V,) index into them; "label": (V,) index into
    NODE_LABELS; "edge_index": (2, E) node indices; "graph_index": (V,) graph of each node;
    "num_graphs": G. All tensors int64 on the CPU. Raises what `read_radgraph` raises.
    """
    phrase_ids: dict[str, int] = {}
    node, label, edges, graph = [], [], [], []
    for g, record in enumerate(records):
        phrases, labels, pairs = read_radgraph(record)
        edges += [(len(node) + i, len(node) + j) for i, j in pairs]
        node += [phrase_ids.setdefault(phrase.lower(), len(phrase_ids)) for phrase in phrases]
        label += [NODE_LABELS.index(name) for name in labels]
        graph += [g] * len(phrases)
    return {
        "phrases": list(phrase_ids),
        "node": torch.tensor(node, dtype=torch.int64),                             # (V,)
        "label": torch.tensor(label, dtype=torch.int64),                           # (V,)
        "edge_index": torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).T,     # (2, E)
        "graph_index": torch.tensor(graph, dtype=torch.int64),                     # (V,)
        "num_graphs": len(records),
    }


def _normalize(adjacency: torch.Tensor) -> torch.Tensor:
    """D^-1/2 (A + I) D^-1/2 of a (..., V, V) adjacency of 0 and 1, made symmetric first."""
    # ASSUMPTION: relations are undirected, their names unused; a graph is its nodes' mean.
    a = torch.maximum(adjacency, adjacency.mT)                                     # (..., V, V)
    a.diagonal(dim1=-2, dim2=-1).fill_(1)  # A + I; a self loop in the data stays one
    d = a.sum(-1).rsqrt()                                                          # (..., V)
    return d[..., :, None] * a * d[..., None, :]                                   # (..., V, V)


def normalized_adjacency(edge_index: torch.Tensor, num_nodes: int) -> torch.Tensor:
    """A_hat = D^-1/2 (A + I) D^-1/2 of one graph, as a dense float32 matrix.

    edge_index: (2, E) int64, undirected edges given once; an edge given twice, in either direction,
        counts once, since A is 0 or 1.
    num_nodes: V; nodes without an edge keep themselves (A_hat[i, i] = 1).
    Returns (V, V); `GCN` does the same for a whole batch. Source: Kipf & Welling (2017).
    """
    a = torch.zeros(num_nodes, num_nodes, device=edge_index.device)                # (V, V)
    a[edge_index[0], edge_index[1]] = 1
    return _normalize(a)


class GCN(nn.Module):
    """Two graph convolutions, ReLU between them, then the mean over each graph's nodes (Sec. 4.3).

    in_features, hidden_features, out_features: widths F -> hidden -> out.
    Report graphs have tens of nodes, so a batch is one dense, padded (G, P, P) adjacency: two
    batched products, no scatter, the same result on every run.
    """

    def __init__(self, in_features: int, hidden_features: int, out_features: int):
        super().__init__()
        self.layer1 = nn.Linear(in_features, hidden_features)
        self.layer2 = nn.Linear(hidden_features, out_features)
        for layer in (self.layer1, self.layer2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, edge_index, graph_index, num_graphs):
        """Encode a batch of graphs.

        x: (V, F) features of all graphs' nodes; edge_index: (2, E) int64, edges given once, both
        ends in one graph; graph_index: (V,) int64 in [0, num_graphs), in any order;
        num_graphs: G. Returns (G, out_features); a graph without nodes gives zeros.
        Raises ValueError for shapes that do not fit together.
        """
        if x.dim() != 2 or graph_index.shape != x.shape[:1]:
            raise ValueError(f"expected x (V, F) and graph_index (V,), got {tuple(x.shape)} and "
                             f"{tuple(graph_index.shape)}")
        if edge_index.dim() != 2 or edge_index.shape[0] != 2:
            raise ValueError(f"expected edge_index (2, E), got {tuple(edge_index.shape)}")
        if bool((edge_index < 0).any()) or bool((graph_index < 0).any()):
            raise ValueError("expected edge_index and graph_index of at least 0")
        size = torch.bincount(graph_index, minlength=num_graphs)                   # (G,) nodes
        if size.shape[0] != num_graphs:
            raise ValueError(f"expected graph_index below num_graphs = {num_graphs}")
        largest = int(size.max()) if x.shape[0] else 0
        if not largest:
            return x.new_zeros(num_graphs, self.layer2.out_features)               # (G, out)
        order = graph_index.argsort(stable=True)                                   # (V,)
        place = torch.empty_like(order)
        place[order] = (torch.arange(len(order), device=x.device)
                        - (size.cumsum(0) - size)[graph_index[order]])             # (V,)
        i, j = edge_index
        a = torch.zeros(num_graphs, largest, largest, device=x.device)             # (G, P, P)
        a[graph_index[i], place[i], place[j]] = 1
        a_hat = _normalize(a).to(x.dtype)                                          # (G, P, P)
        h = x @ self.layer1.weight.T                                               # (V, hidden)
        h = h.new_zeros(num_graphs, largest, h.shape[1]).index_put((graph_index, place), h)
        h = torch.relu(a_hat @ h + self.layer1.bias)                               # (G, P, hidden)
        # The mean over nodes and the second layer are both linear: mean(A_hat H1) first, then W2.
        real = torch.arange(largest, device=x.device) < size[:, None]              # (G, P)
        mean = real.to(x.dtype) / size.clamp(min=1)[:, None]                       # (G, P)
        h = (mean[:, None] @ a_hat @ h)[:, 0]                                      # (G, hidden)
        return self.layer2(h) * (size > 0)[:, None]                                # (G, out)
