from unittest import mock

import pytest
import torch

import ops
from ops.reference.trie_topk_step import trie_topk_step as reference
from ops.triton import trie_topk_step as twin
from tests.kernels.harness import DTYPES, randn
from tests.kernels.recompiles import num_graphs
from tests.ops.leaf_filters import leaf_filter_of, moved, random_leaf_begins, random_leaf_filter

# The interpreter computes infinity - infinity in places without a child, which are then passed over.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def random_trie(num_nodes, num_codes, share=0.5, seed=0):
    """Row pointers and codes of nodes with random children; node 1 has none, node 0 all."""
    present = torch.rand(num_nodes, num_codes, generator=torch.Generator().manual_seed(seed)) < share
    present[0] = True
    present[1:2] = False
    row_ptr = torch.nn.functional.pad(present.sum(1).cumsum(0), (1, 0)).int()
    return row_ptr, present.nonzero()[:, 1].int()


def case(num_rows=3, num_beams=3, num_codes=5, share=0.5, seed=0):
    """Inputs whose second row has an empty beam at its end, and whose third has empty beams only."""
    generator = torch.Generator().manual_seed(seed)
    num_nodes = 2 * num_beams + 1
    row_ptr, edge_codes = random_trie(num_nodes, num_codes, share, seed)
    nodes = torch.stack([torch.randperm(num_nodes, generator=generator)[:num_beams] for _ in range(num_rows)])
    nodes = nodes.sort(1).values
    nodes[1:2, -1] = -1
    nodes[2:3] = -1
    scores = torch.where(nodes < 0, -torch.inf, randn(num_rows, num_beams, seed=seed + 1))
    return {
        "logits": 3 * randn(num_rows, num_beams, num_codes, seed=seed + 2),
        "nodes": nodes,
        "scores": scores,
        "row_ptr": row_ptr,
        "edge_codes": edge_codes,
    }


def assert_equal(device, inputs, beam_width, *, exact_scores=False, leaf_filter=None, **options):
    """Choices exactly; scores within the rounding of a log-sum-exp."""
    on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
    filter_there = None if leaf_filter is None else moved(leaf_filter, device)
    found = ops.trie_topk_step(**on_device, beam_width=beam_width, leaf_filter=filter_there, **options)
    got = [output.cpu() for output in found]
    expected = reference(**inputs, beam_width=beam_width, leaf_filter=leaf_filter, **options)
    for name, one, other in zip(("parents", "codes", "nodes"), got, expected, strict=False):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    tolerance = 0.0 if exact_scores else 2e-6
    torch.testing.assert_close(got[3], expected[3], rtol=tolerance, atol=4 * tolerance)


def check(device, dtype, beam_width=4, **options):
    inputs = case(**options)
    inputs["logits"] = inputs["logits"].to(dtype)
    assert_equal(device, inputs, beam_width)
    for normalize, codes in (("children", torch.int16), ("none", torch.int32)):
        inputs["edge_codes"] = inputs["edge_codes"].to(codes)
        inputs["leaf_begins"] = random_leaf_begins(len(inputs["edge_codes"]))
        leaf_filter = random_leaf_filter(len(inputs["nodes"]), int(inputs["leaf_begins"][-1]))
        assert_equal(device, inputs, beam_width, normalize=normalize, leaf_filter=leaf_filter)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("num_codes", [1, 5, 64])
def test_parity(device, dtype, num_beams, num_codes):
    check(device, dtype, 20, num_beams=num_beams, num_codes=num_codes)


def check_shortlists(device, dtype, beam_width=20, seed=0):
    """More places than a program holds, here 64, in four rounds; the last row has none."""
    inputs = case(num_beams=20, num_codes=33, seed=seed)
    inputs["logits"] = inputs["logits"].to(dtype)
    with mock.patch.object(twin, "_MAX_PLACES", 64):
        assert_equal(device, inputs, beam_width)


@pytest.mark.parametrize("beam_width", [1, 7, 32])
def test_shortlists(device, beam_width):
    check_shortlists(device, torch.float32, beam_width, seed=beam_width)


def test_ties_in_shortlists_go_to_the_lowest_node(device, monkeypatch):
    monkeypatch.setattr(twin, "_MAX_PLACES", 32)
    for seed, beam_width in ((0, 5), (1, 16)):
        assert_equal(device, tied(7, 19, seed), beam_width)


def test_parity_of_many_beams(device):
    assert_equal(device, case(num_beams=20, num_codes=64), 20)


@pytest.mark.parametrize("beam_width", [1, 2, 59, 60, 61, 300])
def test_widths(device, beam_width):
    """Around the number of candidates, and beyond one block of slots."""
    assert_equal(device, case(num_rows=1, num_beams=6, num_codes=20, share=1.0), beam_width)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("flags", [False, True])
@pytest.mark.parametrize("edges_are_leaves", [False, True])
def test_filters(device, share, flags, edges_are_leaves):
    """Rows of sets of none, a few, half and all leaves, the second of which may reach its set alone."""
    inputs = case(num_beams=5, num_codes=20)
    inputs["nodes"][2] = torch.tensor([0, 2, 3, 5, 7])
    inputs["scores"] = inputs["scores"].nan_to_num(neginf=0.0)
    num_leaves = len(inputs["edge_codes"])
    if not edges_are_leaves:
        inputs["leaf_begins"] = random_leaf_begins(num_leaves)
        num_leaves = int(inputs["leaf_begins"][-1])
    for tail in (0, 3):
        leaf_filter = random_leaf_filter(3, num_leaves, share=share, flags=flags, tail=tail, seed=tail)
        assert_equal(device, inputs, 7, leaf_filter=leaf_filter)


@pytest.mark.parametrize("size", range(10))
def test_sets_of_every_small_size(device, size):
    """All leaves are children of one node: the search must find each one of the set, and no other."""
    num_leaves = 20
    inputs = {
        "logits": torch.zeros(2, 1, num_leaves),
        "nodes": torch.zeros(2, 1, dtype=torch.int64),
        "scores": torch.zeros(2, 1),
        "row_ptr": torch.tensor([0, num_leaves], dtype=torch.int32),
        "edge_codes": torch.arange(num_leaves, dtype=torch.int16),
    }
    chosen = set(torch.randperm(num_leaves, generator=torch.Generator().manual_seed(size))[:size].tolist())
    leaf_filter = moved(leaf_filter_of([chosen, chosen], [True, False]), device)
    on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
    nodes = ops.trie_topk_step(**on_device, beam_width=num_leaves, leaf_filter=leaf_filter)[2].tolist()
    assert nodes[0] == sorted(chosen) + [-1] * (num_leaves - size)
    assert nodes[1] == sorted(set(range(num_leaves)) - chosen) + [-1] * size


def tied(num_beams, num_codes, seed=0):
    """Every logit is 0 or -inf, so that sums of exponentials are exact and equal scores are equal in every twin."""
    inputs = case(num_rows=3, num_beams=num_beams, num_codes=num_codes, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    zero = torch.rand(inputs["logits"].shape, generator=generator) < 0.7
    zero[..., 0] = True
    inputs["logits"] = torch.where(zero, 0.0, -torch.inf)
    inputs["scores"] = torch.randint(-2, 1, inputs["nodes"].shape, generator=generator).float()
    return inputs


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("beam_width", [1, 5, 20])
@pytest.mark.parametrize("normalize", ["level", "children", "none"])
def test_ties_go_to_the_lowest_node(device, seed, beam_width, normalize):
    assert_equal(device, tied(4, 9, seed), beam_width, normalize=normalize)


def test_one_tie_of_all(device):
    """As many equal candidates as a program holds."""
    num_beams, num_codes = 16, 1024
    row_ptr = torch.arange(num_beams + 1, dtype=torch.int32) * num_codes
    inputs = {
        "logits": torch.zeros(1, num_beams, num_codes),
        "nodes": torch.arange(num_beams)[None],
        "scores": torch.zeros(1, num_beams),
        "row_ptr": row_ptr,
        "edge_codes": torch.arange(num_codes, dtype=torch.int32).repeat(num_beams),
    }
    assert_equal(device, inputs, 7)
    assert_equal(device, inputs, num_beams * num_codes)


def test_both_zeros_are_equal(device):
    inputs = {
        "logits": torch.tensor([[[0.0], [0.0]]]),  # one code: log-softmax 0
        "nodes": torch.tensor([[0, 1]]),
        "scores": torch.tensor([[-0.0, 0.0]]),
        "row_ptr": torch.tensor([0, 1, 2], dtype=torch.int32),
        "edge_codes": torch.tensor([0, 0], dtype=torch.int32),
    }
    assert_equal(device, inputs, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_broken_logits(device, value):
    """A row of -inf has no distribution, one with a single -inf has a child of probability zero."""
    inputs = case(num_rows=2, num_beams=4, num_codes=6, share=1.0)
    inputs["nodes"] = torch.tensor([[0, 2, 3, 4], [2, 3, 5, 6]])
    inputs["scores"] = randn(2, 4, seed=4)
    inputs["logits"][0, 1, 3] = value
    inputs["logits"][0, 2] = value
    inputs["logits"][1] = value
    for beam_width in (3, 30):
        assert_equal(device, inputs, beam_width)


def test_too_many_candidates_run_in_pytorch(device, monkeypatch):
    monkeypatch.setattr(twin, "_MAX_PLACES", 14)
    monkeypatch.setattr(twin, "trie_topk_step", None)
    check(device, torch.float32, 8)


def test_non_contiguous_and_expanded_inputs(device):
    inputs = case(num_beams=4)
    inputs["logits"] = inputs["logits"].mT.contiguous().mT
    inputs["nodes"] = inputs["nodes"][:1].expand(3, -1)
    inputs["scores"] = torch.zeros(1, 1).expand(3, 4)
    assert_equal(device, inputs, 5, normalize="children")


def test_no_rows(device):
    inputs = case()
    assert_equal(device, inputs | {name: inputs[name][:0] for name in ("logits", "nodes", "scores")}, 4)


def test_opcheck(device):
    inputs = [tensor.to(device) for tensor in case().values()]
    num_edges = len(inputs[-1])
    offsets, leaves, only, before = moved(random_leaf_filter(3, num_edges), device)
    begins = torch.arange(num_edges + 1, dtype=torch.int32, device=device)
    torch.library.opcheck(twin.FORWARD, (*inputs, 4, "level", None, None, None, None, None))
    torch.library.opcheck(
        twin.FORWARD, (*inputs, 4, "children", begins, offsets, leaves, only.view(torch.uint8), before)
    )


def test_compiles_as_one_graph(device):
    inputs = {name: tensor.to(device) for name, tensor in case().items()}
    leaf_filter = moved(random_leaf_filter(3, len(inputs["edge_codes"])), device)

    def step(logits, scores):
        return ops.trie_topk_step(
            **inputs | {"logits": logits, "scores": scores}, beam_width=4, leaf_filter=leaf_filter
        )

    got = torch.compile(step, fullgraph=True, backend="aot_eager")(inputs["logits"], inputs["scores"])
    for one, other in zip(got, step(inputs["logits"], inputs["scores"]), strict=True):
        torch.testing.assert_close(one, other)


def test_one_graph_for_any_number_of_rows(device):
    row_ptr, edge_codes = (tensor.to(device) for tensor in random_trie(7, 5))

    def step(logits, nodes, scores):
        return ops.trie_topk_step(logits, nodes, scores, row_ptr, edge_codes, beam_width=4)

    inputs = (case(num_rows=rows) for rows in (6, 8, 9))
    names = ("logits", "nodes", "scores")
    assert num_graphs(step, (tuple(given[name].to(device) for name in names) for given in inputs)) == 1
