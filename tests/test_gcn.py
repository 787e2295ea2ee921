"""gcn.py against hand-computed graphs, a dense oracle in float64 and torch_geometric.

SPDX-License-Identifier: MIT
"""

import itertools
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gcn
from gcn import GCN, NODE_LABELS, GraphError, collate_graphs, read_radgraph

V1 = {"text": "no effusion left base", "entities": {
    "1": {"tokens": "effusion", "label": "OBS-DA", "start_ix": 1, "end_ix": 1,
          "relations": [["located_at", "3"]]},
    "2": {"tokens": "left", "label": "ANAT-DP", "start_ix": 2, "end_ix": 2,
          "relations": [["modify", "3"]]},
    "3": {"tokens": "base", "label": "ANAT-DP", "start_ix": 3, "end_ix": 3, "relations": []}}}
XL = {"text": "possible opacity 3 mm", "entities": {
    "1": {"tokens": "opacity", "label": "Observation::uncertain", "relations": []},
    "2": {"tokens": "3 mm", "label": "Observation::measurement::definitely present",
          "relations": [["modify", "1"]]},
    "3": {"tokens": "Lung", "label": "Anatomy::uncertain", "relations": []},
    "4": {"tokens": "edema", "label": "Observation::definitely absent", "relations": []}}}


def record(size, *edges):
    """A record of `size` entities, 0 to size - 1, each edge a relation of its first end."""
    return {"entities": {str(i): {
        "tokens": f"word {i}", "label": "OBS-DP",
        "relations": [["modify", str(b)] for a, b in edges if a == i]} for i in range(size)}}


def random_records(sizes):
    """Records of simple random graphs and their edges, each of which has either direction."""
    draw = random.Random(0)
    edges = [[draw.choice([(i, j), (j, i)]) for i, j in itertools.combinations(range(size), 2)
              if draw.random() < 0.4] for size in sizes]
    return [record(size, *pairs) for size, pairs in zip(sizes, edges, strict=True)], edges


def network(dtype=torch.float32):
    torch.manual_seed(0)
    net = GCN(5, 7, 3)
    for layer in (net.layer1, net.layer2):
        torch.nn.init.uniform_(layer.bias, -1, 1)
    return net.to(dtype)


def a_hat_of(records):
    """The batch's A_hat as a dense matrix."""
    graphs = collate_graphs(records)
    nodes = len(graphs["node"])
    a_hat = torch.zeros(nodes, nodes)
    a_hat[tuple(graphs["a_indices"])] = graphs["a_values"]
    return a_hat


def dense(net, x, edges):
    """One graph by Kipf's formula, written with dense matrices and loops: the oracle."""
    a = torch.eye(len(x), dtype=x.dtype)
    for i, j in edges:
        a[i, j] = a[j, i] = 1
    root = torch.diag(a.sum(1) ** -0.5)
    a_hat = root @ a @ root
    h = torch.relu(a_hat @ x @ net.layer1.weight.T + net.layer1.bias)
    return (a_hat @ h @ net.layer2.weight.T + net.layer2.bias).mean(0)


def test_adjacency_of_a_path_of_three_nodes_by_hand():
    s = 6 ** -0.5  # degrees with self loops: 2, 3, 2
    expected = torch.tensor([[1 / 2, s, 0], [s, 1 / 3, s], [0, s, 1 / 2]])
    assert torch.allclose(a_hat_of([record(3, (0, 1), (1, 2))]), expected)


def test_repeated_edges_both_directions_and_self_loops_leave_the_adjacency_zero_or_one():
    messy = record(3, (0, 1), (0, 1), (1, 0), (2, 2))
    assert torch.equal(a_hat_of([messy]), a_hat_of([record(3, (0, 1))]))
    assert a_hat_of([messy])[2].tolist() == [0, 0, 1]  # an isolated node keeps itself
    assert a_hat_of([{}, {}]).tolist() == [[1, 0], [0, 1]]  # each its one empty node
    records = [messy, *random_records([3, 0, 1, 6])[0]]
    pairs = collate_graphs(records)["a_indices"].T.tolist()
    assert pairs == sorted(pairs) and len({tuple(pair) for pair in pairs}) == len(pairs)


def test_a_batch_and_its_gradients_equal_dense_graphs_one_by_one():
    sizes = [3, 1, 6, 12, 0]
    records, edges = random_records(sizes)
    net = network(dtype=torch.float64)
    x = torch.randn(23, 5, dtype=torch.float64, requires_grad=True)  # the empty one has a node
    weight = torch.randn(5, 3, dtype=torch.float64)
    ours = net(x, collate_graphs(records))
    oracle = torch.stack([dense(net, rows, pairs)
                          for rows, pairs in zip(x.split([3, 1, 6, 12, 1]), edges, strict=True)])
    assert torch.allclose(ours, oracle, atol=1e-6)  # A_hat itself is float32
    tensors = [x, *net.parameters()]
    for mine, theirs in zip(torch.autograd.grad((ours * weight).sum(), tensors),
                            torch.autograd.grad((oracle * weight).sum(), tensors), strict=True):
        assert theirs.abs().max() > 1e-3
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_two_layers_equal_torch_geometric():
    nn = pytest.importorskip("torch_geometric.nn", reason="torch_geometric is not installed")
    net = network()
    first, second = nn.GCNConv(5, 7), nn.GCNConv(7, 3)
    with torch.no_grad():
        for ours, theirs in ((net.layer1, first), (net.layer2, second)):
            theirs.lin.weight.copy_(ours.weight)
            theirs.bias.copy_(ours.bias)
    records, edges = random_records([4, 1, 9])
    pairs = [(i + start, j + start) for start, graph in zip((0, 4, 5), edges, strict=True)
             for i, j in graph]
    both = torch.tensor(pairs + [(j, i) for i, j in pairs]).T
    x, graphs = torch.randn(14, 5), collate_graphs(records)
    theirs = second(torch.relu(first(x, both)), both)
    theirs = nn.global_mean_pool(theirs, graphs["graph_index"], 3)
    assert torch.allclose(net(x, graphs), theirs, atol=1e-6)


def test_autocast_does_not_lower_the_precision():
    graphs = collate_graphs(random_records([4, 6])[0])
    net, x = network(), torch.randn(10, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x.T).dtype == torch.bfloat16  # the negative control
        inside = net(x, graphs)
    assert torch.equal(inside, net(x, graphs)) and inside.dtype == torch.float32


def test_shapes_that_do_not_fit_are_refused():
    graphs = collate_graphs([record(3, (0, 1))])
    good = graphs["graph_index"]
    for x, index in ((torch.zeros(2, 5), good), (torch.zeros(3, 5), good[:2]),
                     (torch.zeros(3, 5), good + 1)):
        with pytest.raises((RuntimeError, IndexError)):
            network()(x, graphs | {"graph_index": index})


def test_both_label_styles_are_read_and_a_record_may_come_under_its_key():
    expected = (["effusion", "left", "base"], ["OBS-DA", "ANAT-DP", "ANAT-DP"], [(0, 2), (1, 2)])
    for wrapped in (V1, {"0": V1}, {"p10/p10000032/s50414267.txt": V1}):
        assert read_radgraph(wrapped) == expected
    assert read_radgraph(XL)[1] == ["OBS-U", "OBS-DP", "ANAT-DP", "OBS-DA"]


@pytest.mark.parametrize("empty", [{}, {"entities": {}}, {"text": "", "entities": {}},
                                   {"0": {"entities": {}}}, {"0": {}}])
def test_empty_records_are_empty_graphs(empty):
    assert read_radgraph(empty) == ([], [], [])


@pytest.mark.parametrize("wrong", [
    {"0": []}, {"secret": "secret"}, {"0": {"0": V1}}, {"entities": []}, {"entities": None}, [],
    None, "secret", {"0": V1, "1": V1}, {"text": "secret", "data_source": None}])
def test_what_is_no_record_is_refused(wrong):
    with pytest.raises(GraphError, match="expected a RadGraph record") as caught:
        read_radgraph(wrong)
    assert "secret" not in str(caught.value) and issubclass(GraphError, ValueError)


BAD_ENTITIES = {  # what was expected: what was there
    "a label of RadGraph or of RadGraph-XL": [{"tokens": "secret"}, *(
        {"tokens": "secret", "label": label}
        for label in ("secret", "OBS", "Observation::secret", 5, ["secret"]))],
    "an object with text in tokens": [
        {"label": "OBS-DP"}, {"tokens": ["secret"], "label": "OBS-DP"}, "secret"],
    "relations as a list of": [
        {"tokens": "secret", "label": "OBS-DP", "relations": relations}
        for relations in ([["secret", "9"]], [["secret", ["1"]]], [[["secret"], {"secret": 1}]],
                          [["secret", "secret", "1"]], ["secret"], [7], 7, None, {"secret": 1},
                          [["secret", None]])]}


@pytest.mark.parametrize("expected,entity", [
    (expected, entity) for expected in BAD_ENTITIES for entity in BAD_ENTITIES[expected]])
def test_bad_entities_are_named_by_their_place_without_showing_text(expected, entity):
    good = {"tokens": "secret", "label": "OBS-DP", "relations": []}
    with pytest.raises(GraphError, match=f"RadGraph entity 2: expected {expected}") as caught:
        read_radgraph({"text": "secret", "entities": {"0": good, "secret": entity}})
    assert "secret" not in str(caught.value) and caught.value.__cause__ is None
    assert "\n" not in str(caught.value)


def test_collated_graphs_keep_each_phrase_once_and_shift_edges():
    batch = collate_graphs([V1, {}, XL, V1])
    assert batch["phrases"] == ["effusion", "left", "base", "opacity", "3 mm", "lung", "edema"]
    assert batch["node"].tolist() == [0, 1, 2, -1, 3, 4, 5, 6, 0, 1, 2]
    assert batch["graph_index"].tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3]
    assert batch["sizes"].tolist() == [3, 1, 4, 3]
    once = [pair for pair in batch["a_indices"].T.tolist() if pair[0] < pair[1]]
    assert once == [[0, 2], [1, 2], [4, 5], [8, 10], [9, 10]]
    labels = [NODE_LABELS[i] for i in batch["label"][:4]]
    assert labels == ["OBS-DA", "ANAT-DP", "ANAT-DP", "ANAT-DP"]
    assert collate_graphs([{}, {}])["phrases"] == []
    dtypes = {name: value.dtype for name, value in batch.items() if name != "phrases"}
    assert dtypes == dict.fromkeys(("node", "label", "a_indices", "graph_index"), torch.int64) | \
        dict.fromkeys(("a_values", "sizes"), torch.float32)


def test_the_file_works_alone(tmp_path):
    shutil.copy(Path(gcn.__file__), tmp_path)
    script = ("import torch, gcn; b = gcn.collate_graphs([{}]); net = gcn.GCN(3, 4, 5);"
              "print(net(torch.zeros(1, 3), b).shape)")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([1, 5])"
