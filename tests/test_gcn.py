"""gcn.py against hand-computed graphs, a dense oracle in float64 and torch_geometric.

SPDX-License-Identifier: MIT
"""

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


def random_records(sizes, seed=0):
    """Records of simple random graphs and their edges: each pair with probability 0.4."""
    g = torch.Generator().manual_seed(seed)
    edges = [[(i, j) for i in range(size) for j in range(i + 1, size)
              if torch.rand((), generator=g) < 0.4] for size in sizes]
    return [record(size, *pairs) for size, pairs in zip(sizes, edges, strict=True)], edges


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    net = GCN(5, 7, 3)
    for layer in (net.layer1, net.layer2):
        torch.nn.init.uniform_(layer.bias, -1, 1)
    return net.to(dtype)


def run(net, records, x):
    return net(x, collate_graphs(records))


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
    a_hat = a_hat_of([record(3, (0, 1), (1, 2))])
    # degrees with self loops: 2, 3, 2
    s = 6 ** -0.5
    assert torch.allclose(a_hat, torch.tensor([[1 / 2, s, 0], [s, 1 / 3, s], [0, s, 1 / 2]]))


def test_gcn_of_three_nodes_by_hand():
    net = GCN(1, 1, 1)
    with torch.no_grad():
        for layer, weight, bias in ((net.layer1, 2.0, -1.0), (net.layer2, 3.0, 0.5)):
            layer.weight.fill_(weight)
            layer.bias.fill_(bias)
    x = torch.tensor([[1.0], [0.0], [-1.0]])
    path = [record(3, (0, 1), (1, 2))]
    # A X = (1/2, 0, -1/2); H1 = relu(2 A X - 1) = (0, 0, 0); H2 = 0.5 everywhere
    assert run(net, path, x).tolist() == [[0.5]]
    with torch.no_grad():
        net.layer1.bias.fill_(1.0)
    # H1 = relu(1 + 1, 0 + 1, -1 + 1) = (2, 1, 0); A H1 = (1 + s, 2s + 1/3, s); mean of 3 A H1 + 0.5
    s = 6 ** -0.5
    expected = 0.5 + 3 * ((1 + s) + (2 * s + 1 / 3) + s) / 3
    assert run(net, path, x).item() == pytest.approx(expected)


def test_repeated_edges_both_directions_and_self_loops_leave_the_adjacency_zero_or_one():
    once = a_hat_of([record(3, (0, 1))])
    messy = a_hat_of([record(3, (0, 1), (0, 1), (1, 0), (2, 2))])
    assert torch.equal(once, messy)
    assert once[2].tolist() == [0, 0, 1]  # an isolated node keeps itself


def test_each_entry_of_the_adjacency_is_there_once_and_it_is_symmetric():
    records, _ = random_records([3, 0, 1, 6])
    pairs = collate_graphs(records)["a_indices"].T.tolist()
    assert pairs == sorted(pairs) and len({tuple(pair) for pair in pairs}) == len(pairs)
    assert torch.equal(a_hat_of(records), a_hat_of(records).T)


def test_a_batch_and_its_gradients_equal_dense_graphs_one_by_one():
    sizes = [3, 1, 6, 12]
    records, edges = random_records(sizes)
    net = network(dtype=torch.float64)
    x = torch.randn(sum(sizes), 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(sizes), 3, dtype=torch.float64)
    ours = run(net, records, x)
    oracle = torch.stack([dense(net, rows, pairs)
                          for rows, pairs in zip(x.split(sizes), edges, strict=True)])
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
    x, graph = torch.randn(14, 5), collate_graphs(records)["graph_index"]
    theirs = nn.global_mean_pool(second(torch.relu(first(x, both)), both), graph, 3)
    assert torch.allclose(run(net, records, x), theirs, atol=1e-6)


def test_a_graphs_result_does_not_depend_on_its_company():
    records, _ = random_records([4, 9, 1])
    net, x = network(), torch.randn(14, 5)
    together = run(net, records, x)
    for k, rows in enumerate(x.split([4, 9, 1])):
        assert torch.allclose(run(net, records[k:k + 1], rows)[0], together[k], atol=1e-6)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_the_same_batch_gives_the_same_bits_forward_and_backward():
    records, _ = random_records([30, 9, 1, 54] * 4)
    net, x = network(), torch.randn(94 * 4, 5, requires_grad=True)
    runs = [torch.autograd.grad(run(net, records, x).square().sum(), [x, *net.parameters()])
            for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_node_order_does_not_matter():
    net, x = network(), torch.randn(4, 5)
    order = torch.tensor([2, 0, 3, 1])  # new node k is the old node order[k]
    place = order.argsort().tolist()
    edges = [(0, 1), (1, 2), (1, 3)]
    moved = [record(4, *[(place[i], place[j]) for i, j in edges])]
    expected = run(net, [record(4, *edges)], x)
    assert torch.allclose(run(net, moved, x[order]), expected, atol=1e-6)
    assert not torch.allclose(run(net, moved, x), expected, atol=1e-3)


def test_autocast_does_not_lower_the_precision():
    records, _ = random_records([4, 6])
    net, x = network(), torch.randn(10, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x.T).dtype == torch.bfloat16  # the negative control
        inside = run(net, records, x)
    assert torch.equal(inside, run(net, records, x)) and inside.dtype == torch.float32


def test_shapes_that_do_not_fit_are_refused():
    graphs = collate_graphs([record(3, (0, 1))])
    good = graphs["graph_index"]
    for x, index in ((torch.zeros(2, 5), good), (torch.zeros(3, 5), good[:2]),
                     (torch.zeros(3, 5), good + 1)):
        with pytest.raises((RuntimeError, IndexError)):
            network()(x, graphs | {"graph_index": index})


def test_both_label_styles_are_read():
    phrases, labels, edges = read_radgraph(V1)
    assert (phrases, labels) == (["effusion", "left", "base"], ["OBS-DA", "ANAT-DP", "ANAT-DP"])
    assert edges == [(0, 2), (1, 2)]
    assert read_radgraph(XL)[1] == ["OBS-U", "OBS-DP", "ANAT-DP", "OBS-DA"]


@pytest.mark.parametrize("wrapped", [{"0": V1}, {"p10/p10000032/s50414267.txt": V1}])
def test_a_record_may_come_under_its_key(wrapped):
    assert read_radgraph(wrapped) == read_radgraph(V1)


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
    assert "secret" not in str(caught.value)


LABEL = "expected a label of RadGraph or of RadGraph-XL"
RELATIONS = "expected relations as a list of"


@pytest.mark.parametrize("entity,message", [
    ({"tokens": "secret", "label": "secret"}, LABEL),
    ({"tokens": "secret", "label": "OBS"}, LABEL),
    ({"tokens": "secret", "label": "Observation::secret"}, LABEL),
    ({"tokens": "secret", "label": 5}, LABEL),
    ({"tokens": "secret", "label": ["secret"]}, LABEL),
    ({"tokens": "secret"}, LABEL),
    ({"label": "OBS-DP"}, "expected an object with text in tokens"),
    ({"tokens": ["secret"], "label": "OBS-DP"}, "expected an object with text in tokens"),
    ("secret", "expected an object with text in tokens"),
    *[({"tokens": "secret", "label": "OBS-DP", "relations": relations}, RELATIONS)
      for relations in ([["secret", "9"]], [["secret", ["1"]]], [[["secret"], {"secret": 1}]],
                        [["secret", "secret", "1"]], ["secret"], [7], 7, None, {"secret": 1},
                        [["secret", None]])],
])
def test_bad_entities_are_named_by_their_place_without_showing_text(entity, message):
    good = {"tokens": "secret", "label": "OBS-DP", "relations": []}
    with pytest.raises(GraphError, match=f"RadGraph entity 2: {message}") as caught:
        read_radgraph({"text": "secret", "entities": {"0": good, "secret": entity}})
    assert "secret" not in str(caught.value) and caught.value.__cause__ is None
    assert "\n" not in str(caught.value)


def test_a_graph_error_is_a_value_error():
    assert issubclass(GraphError, ValueError)


def test_collated_graphs_keep_each_phrase_once_and_shift_edges():
    batch = collate_graphs([V1, {}, XL, V1])
    assert batch["phrases"] == ["effusion", "left", "base", "opacity", "3 mm", "lung", "edema"]
    assert batch["node"].tolist() == [0, 1, 2, -1, 3, 4, 5, 6, 0, 1, 2]
    assert batch["graph_index"].tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3]
    assert batch["sizes"].tolist() == [3, 1, 4, 3]
    once = [pair for pair in batch["a_indices"].T.tolist() if pair[0] < pair[1]]
    assert once == [[0, 2], [1, 2], [4, 5], [8, 10], [9, 10]]
    assert [NODE_LABELS[i] for i in batch["label"][:4]] == ["OBS-DA", "ANAT-DP", "ANAT-DP",
                                                            "ANAT-DP"]
    dtypes = {name: value.dtype for name, value in batch.items() if name != "phrases"}
    assert dtypes == dict.fromkeys(("node", "label", "a_indices", "graph_index"), torch.int64) | \
        dict.fromkeys(("a_values", "sizes"), torch.float32)


def test_a_batch_of_empty_graphs_has_one_node_a_graph_and_no_phrase():
    batch = collate_graphs([{}, {}])
    assert batch["phrases"] == [] and batch["node"].tolist() == [-1, -1]
    assert a_hat_of([{}, {}]).tolist() == [[1, 0], [0, 1]]
    assert batch["sizes"].tolist() == [1, 1]


def test_the_file_works_alone(tmp_path):
    shutil.copy(Path(gcn.__file__), tmp_path)
    script = ("import torch, gcn; b = gcn.collate_graphs([{}]); net = gcn.GCN(3, 4, 5);"
              "print(net(torch.zeros(1, 3), b).shape)")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([1, 5])"
