"""gcn.py against hand-computed graphs and torch_geometric.

SPDX-License-Identifier: MIT
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gcn
from gcn import GCN, NODE_LABELS, collate_graphs, normalized_adjacency, read_radgraph

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


def random_batch(sizes, features=5, seed=0):
    """Simple graphs of the given sizes, each edge once, as GCN.forward takes them."""
    g = torch.Generator().manual_seed(seed)
    edges, graph, start = [], [], 0
    for k, size in enumerate(sizes):
        pairs = torch.triu_indices(size, size, 1) + start
        edges.append(pairs[:, torch.rand(pairs.shape[1], generator=g) < 0.4])
        graph += [k] * size
        start += size
    x = torch.randn(start, features, generator=g)
    return x, torch.cat(edges, 1), torch.tensor(graph, dtype=torch.int64), len(sizes)


def test_adjacency_of_a_path_of_three_nodes_by_hand():
    a_hat = normalized_adjacency(torch.tensor([[0, 1], [1, 2]]), 3)
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
    out = net(x, torch.tensor([[0, 1], [1, 2]]), torch.zeros(3, dtype=torch.int64), 1)
    # A X = (1/2, 0, -1/2); H1 = relu(2 A X - 1) = (0, 0, 0); H2 = 0.5 everywhere
    assert out.tolist() == [[0.5]]
    with torch.no_grad():
        net.layer1.bias.fill_(1.0)
    # H1 = relu(1 + 1, 0 + 1, -1 + 1) = (2, 1, 0); A H1 = (1 + s, 2s + 1/3, s); mean of 3 A H1 + 0.5
    s = 6 ** -0.5
    expected = 0.5 + 3 * ((1 + s) + (2 * s + 1 / 3) + s) / 3
    out = net(x, torch.tensor([[0, 1], [1, 2]]), torch.zeros(3, dtype=torch.int64), 1)
    assert out.item() == pytest.approx(expected)


def test_repeated_edges_both_directions_and_self_loops_leave_the_adjacency_zero_or_one():
    once = normalized_adjacency(torch.tensor([[0], [1]]), 3)
    messy = normalized_adjacency(torch.tensor([[0, 0, 1, 2], [1, 1, 0, 2]]), 3)
    assert torch.equal(once, messy)
    assert once[2].tolist() == [0, 0, 1]  # an isolated node keeps itself


def test_a_batch_of_graphs_equals_its_graphs_one_by_one():
    torch.manual_seed(0)
    net = GCN(5, 7, 3)
    x, edges, graph, count = random_batch([3, 0, 1, 6])
    together = net(x, edges, graph, count)
    for k in range(count):
        mine = (graph == k).nonzero()[:, 0]
        if len(mine) == 0:
            assert together[k].tolist() == [0, 0, 0]
            continue
        local = edges[:, graph[edges[0]] == k] - mine[0]
        a_hat = normalized_adjacency(local, len(mine))
        h = torch.relu(a_hat @ x[mine] @ net.layer1.weight.T + net.layer1.bias)
        h = a_hat @ h @ net.layer2.weight.T + net.layer2.bias
        assert torch.allclose(together[k], h.mean(0), atol=1e-6)


def test_node_order_does_not_matter():
    torch.manual_seed(0)
    net = GCN(5, 7, 3)
    x, edges, graph, count = random_batch([4, 6, 2])
    order = torch.randperm(len(x))
    where = order.argsort()
    shuffled = net(x[order], where[edges], graph[order], count)
    assert torch.allclose(shuffled, net(x, edges, graph, count), atol=1e-6)
    assert not torch.allclose(net(x[order], edges, graph, count), net(x, edges, graph, count))


def test_a_batch_without_any_node_gives_zeros():
    net = GCN(5, 7, 3)
    out = net(torch.zeros(0, 5), torch.zeros(2, 0, dtype=torch.int64),
              torch.zeros(0, dtype=torch.int64), 2)
    assert out.tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("x,edges,graph,message", [
    (torch.zeros(2, 5), torch.zeros(2, 0), torch.zeros(3), r"expected x \(V, F\) and graph_index"),
    (torch.zeros(2, 5), torch.zeros(3, 0), torch.zeros(2), r"expected edge_index \(2, E\)"),
    (torch.zeros(2, 5), torch.zeros(2, 0), torch.full((2,), 4), "expected graph_index below"),
    (torch.zeros(2, 5), torch.full((2, 1), -1), torch.zeros(2), "of at least 0"),
])
def test_shapes_that_do_not_fit_are_refused(x, edges, graph, message):
    with pytest.raises(ValueError, match=message):
        GCN(5, 7, 3)(x, edges.long(), graph.long(), 2)


def test_two_layers_equal_torch_geometric():
    nn = pytest.importorskip("torch_geometric.nn", reason="torch_geometric is not installed")
    torch.manual_seed(0)
    net = GCN(5, 7, 3)
    first, second = nn.GCNConv(5, 7), nn.GCNConv(7, 3)
    with torch.no_grad():
        for ours, theirs in ((net.layer1, first), (net.layer2, second)):
            theirs.lin.weight.copy_(ours.weight)
            theirs.bias.copy_(ours.bias.uniform_(-1, 1))
    x, edges, graph, count = random_batch([4, 1, 9])
    both = torch.cat([edges, edges.flip(0)], 1)
    theirs = nn.global_mean_pool(second(torch.relu(first(x, both)), both), graph, count)
    assert torch.allclose(net(x, edges, graph, count), theirs, atol=1e-6)


def test_both_label_styles_are_read():
    phrases, labels, edges = read_radgraph(V1)
    assert (phrases, labels) == (["effusion", "left", "base"], ["OBS-DA", "ANAT-DP", "ANAT-DP"])
    assert edges == [(0, 2), (1, 2)]
    assert read_radgraph(XL)[1] == ["OBS-U", "OBS-DP", "ANAT-DP", "OBS-DA"]


@pytest.mark.parametrize("wrapped", [{"0": V1}, {"p10/p10000032/s50414267.txt": V1}])
def test_a_record_may_come_under_its_key(wrapped):
    assert read_radgraph(wrapped) == read_radgraph(V1)


@pytest.mark.parametrize("record", [{}, {"text": "", "entities": {}}, {"0": {"entities": {}}}])
def test_empty_records_are_empty_graphs(record):
    assert read_radgraph(record) == ([], [], [])


@pytest.mark.parametrize("entity,message", [
    ({"tokens": "secret", "label": "OBS", "relations": []}, "entity '1': unknown label 'OBS'"),
    ({"tokens": "secret", "label": "OBS-DP", "relations": [["modify", "9"]]},
     "entity '1': relation 'modify' points to unknown entity '9'"),
    ({"label": "OBS-DP"}, "entity '1': expected an object with text in tokens"),
    ({"tokens": "secret", "label": 5}, "entity '1': unknown label 5"),
    ({"tokens": ["secret"], "label": "OBS-DP"}, "expected an object with text in tokens"),
    ({"tokens": "secret", "label": "OBS-DP", "relations": ["x"]}, "expected relations as"),
])
def test_bad_records_are_refused_by_name_without_showing_text(entity, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_radgraph({"text": "secret", "entities": {"1": entity}})
    assert "secret" not in str(caught.value)


def test_collated_graphs_keep_each_phrase_once_and_shift_edges():
    batch = collate_graphs([V1, {}, XL, V1])
    assert batch["phrases"] == ["effusion", "left", "base", "opacity", "3 mm", "lung", "edema"]
    assert batch["node"].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]
    assert batch["graph_index"].tolist() == [0, 0, 0, 2, 2, 2, 2, 3, 3, 3]
    assert batch["edge_index"].T.tolist() == [[0, 2], [1, 2], [4, 3], [7, 9], [8, 9]]
    assert [NODE_LABELS[i] for i in batch["label"][:1]] == ["OBS-DA"]
    assert batch["num_graphs"] == 4
    assert collate_graphs([{}])["edge_index"].shape == (2, 0)


def test_the_file_works_alone(tmp_path):
    shutil.copy(Path(gcn.__file__), tmp_path)
    script = ("import torch, gcn; b = gcn.collate_graphs([{}]); net = gcn.GCN(3, 4, 5);"
              "print(net(torch.zeros(0, 3), b['edge_index'], b['graph_index'], 1).shape)")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
