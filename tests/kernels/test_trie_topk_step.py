import pytest
import torch

import ops
from ops.reference.trie_topk_step import trie_topk_step as reference
from ops.triton import trie_topk_step as twin
from tests.kernels.harness import DTYPES, randn

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


def assert_equal(device, inputs, beam_width, *, exact_scores=False):
    """Choices exactly; scores within the rounding of a log-sum-exp."""
    on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
    got = [output.cpu() for output in ops.trie_topk_step(**on_device, beam_width=beam_width)]
    expected = reference(**inputs, beam_width=beam_width)
    for name, one, other in zip(("parents", "codes", "nodes"), got, expected, strict=False):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    tolerance = 0.0 if exact_scores else 2e-6
    torch.testing.assert_close(got[3], expected[3], rtol=tolerance, atol=4 * tolerance)


def check(device, dtype, beam_width=4, **options):
    inputs = case(**options)
    assert_equal(device, inputs | {"logits": inputs["logits"].to(dtype)}, beam_width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_beams", [1, 3, 20])
@pytest.mark.parametrize("num_codes", [1, 5, 64])
def test_parity(device, dtype, num_beams, num_codes):
    check(device, dtype, 20, num_beams=num_beams, num_codes=num_codes)


@pytest.mark.parametrize("beam_width", [1, 2, 59, 60, 61, 300])
def test_widths(device, beam_width):
    """Around the number of candidates, and beyond one block of slots."""
    check(device, torch.float32, beam_width, num_rows=1, num_beams=6, num_codes=20, share=1.0)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_forbidden_nodes(device, per_row, share):
    inputs = case(num_beams=5, num_codes=20)
    num_edges = len(inputs["edge_codes"])
    allowed = torch.rand(3, num_edges, generator=torch.Generator().manual_seed(3)) < share
    for flags in (allowed, allowed[:1].expand(3, -1)) if per_row else (allowed[0],):
        assert_equal(device, inputs | {"node_allowed": flags}, 7)


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
def test_ties_go_to_the_lowest_node(device, seed, beam_width):
    assert_equal(device, tied(4, 9, seed), beam_width)


def test_one_tie_of_all(device):
    """As many equal candidates as a program holds."""
    num_beams, num_codes = 32, 1024
    row_ptr = torch.arange(num_beams + 1, dtype=torch.int32) * num_codes
    inputs = {
        "logits": torch.zeros(1, num_beams, num_codes),
        "nodes": torch.arange(num_beams)[None],
        "scores": torch.zeros(1, num_beams),
        "row_ptr": row_ptr,
        "edge_codes": torch.arange(num_codes, dtype=torch.int32).repeat(num_beams),
    }
    assert_equal(device, inputs, 7)
    assert_equal(device, inputs, 32768)


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
    check(device, torch.float32)


def test_non_contiguous_and_expanded_inputs(device):
    inputs = case(num_beams=4)
    inputs["logits"] = inputs["logits"].mT.contiguous().mT
    inputs["nodes"] = inputs["nodes"][:1].expand(3, -1)
    inputs["scores"] = torch.zeros(1, 1).expand(3, 4)
    num_edges = len(inputs["edge_codes"])
    inputs["node_allowed"] = (torch.arange(2 * num_edges) % 3 > 0)[::2].expand(3, -1)
    assert_equal(device, inputs, 5)


def test_no_rows(device):
    inputs = case()
    assert_equal(device, inputs | {name: inputs[name][:0] for name in ("logits", "nodes", "scores")}, 4)


def test_opcheck(device):
    inputs = [tensor.to(device) for tensor in case().values()]
    flags = torch.ones(len(inputs[-1]), dtype=torch.uint8, device=device)
    torch.library.opcheck(twin.FORWARD, (*inputs, 4, None))
    torch.library.opcheck(twin.FORWARD, (*inputs, 4, flags))


def test_compiles_as_one_graph(device):
    inputs = {name: tensor.to(device) for name, tensor in case().items()}
    inputs["node_allowed"] = torch.arange(len(inputs["edge_codes"]), device=device) % 3 > 0

    def step(logits, scores):
        return ops.trie_topk_step(**inputs | {"logits": logits, "scores": scores}, beam_width=4)

    got = torch.compile(step, fullgraph=True, backend="aot_eager")(inputs["logits"], inputs["scores"])
    for one, other in zip(got, step(inputs["logits"], inputs["scores"]), strict=True):
        torch.testing.assert_close(one, other)
