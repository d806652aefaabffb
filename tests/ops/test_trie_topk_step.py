import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ops
from ops.cpu.trie_topk_step import trie_topk_step as cpu
from ops.reference.trie_topk_step import trie_topk_step as reference

HALVES = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
ROW_PTR = torch.tensor([0, 2, 3, 6], dtype=torch.int32)
"""Three nodes; children: node 0 by codes 0, 3; node 1 by code 2; node 2 by codes 0, 1, 2."""
CODES = torch.tensor([0, 3, 2, 0, 1, 2], dtype=torch.int32)


def brute_force(logits, nodes, scores, row_ptr, codes, width, allowed=None):
    """Every candidate of every row in a Python list, sorted by (-score, edge); the best kept, in edge order."""
    log_probabilities = logits.float() - logits.float().logsumexp(-1, keepdim=True)
    lists = []
    for row in range(len(nodes)):
        candidates = []
        for beam, node in enumerate(nodes[row].tolist()):
            for edge in range(int(row_ptr[node]), int(row_ptr[node + 1])) if node >= 0 else ():
                if allowed is None or bool(allowed[edge] if allowed.dim() == 1 else allowed[row, edge]):
                    code = int(codes[edge])
                    score = float(scores[row, beam] + log_probabilities[row, beam, code])
                    candidates.append((-score, edge, beam, code))
        best = sorted(candidates)[:width]
        lists.append(sorted((edge, beam, code, -negative) for negative, edge, beam, code in best))
    return lists


def as_lists(parents, codes, nodes, scores):
    return [
        [
            (node, parent, code, score)
            for node, parent, code, score in zip(n.tolist(), p.tolist(), c.tolist(), s.tolist(), strict=True)
            if node >= 0
        ]
        for p, c, n, s in zip(parents, codes, nodes, scores, strict=True)
    ]


def test_first_step_from_the_root():
    row_ptr = torch.tensor([0, 3], dtype=torch.int32)
    edge_codes = torch.tensor([0, 1, 3], dtype=torch.int32)
    parents, codes, nodes, scores = ops.trie_topk_step(
        HALVES.view(1, 1, 4), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), row_ptr, edge_codes, beam_width=2
    )
    assert parents.tolist() == [[0, 0]]
    assert codes.tolist() == [[0, 1]]
    assert nodes.tolist() == [[0, 1]]
    torch.testing.assert_close(scores.exp(), torch.tensor([[0.5, 0.25]]))


def test_second_step_by_hand():
    logits = torch.stack([HALVES, HALVES.flip(0)])[None]
    nodes = torch.tensor([[0, 2]])
    scores = torch.tensor([[0.5, 0.25]]).log()
    # node 0: 1/2 * (1/2 by code 0, 1/8 by code 3); node 2: 1/4 * (1/8 by 0, 1/8 by 1, 1/4 by 2).
    parents, codes, nodes, scores = ops.trie_topk_step(logits, nodes, scores, ROW_PTR, CODES, beam_width=3)
    assert parents.tolist() == [[0, 0, 1]]
    assert codes.tolist() == [[0, 3, 2]]
    assert nodes.tolist() == [[0, 1, 5]]
    torch.testing.assert_close(scores.exp(), torch.tensor([[1 / 4, 1 / 16, 1 / 16]]))


def test_normalisation_covers_codes_without_children():
    row_ptr = torch.tensor([0, 1], dtype=torch.int32)
    edge_codes = torch.tensor([2], dtype=torch.int32)
    *_, scores = ops.trie_topk_step(
        torch.zeros(1, 1, 10),
        torch.zeros(1, 1, dtype=torch.int64),
        torch.zeros(1, 1),
        row_ptr,
        edge_codes,
        beam_width=1,
    )
    torch.testing.assert_close(scores.exp(), torch.tensor([[0.1]]))


def test_equal_scores_go_to_the_lowest_node():
    row_ptr = torch.tensor([0, 5], dtype=torch.int32)
    edge_codes = torch.arange(5, dtype=torch.int32)
    logits = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]).view(1, 1, 5)
    _, codes, _, _ = ops.trie_topk_step(
        logits, torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), row_ptr, edge_codes, beam_width=3
    )
    assert codes.tolist() == [[0, 1, 3]]


def test_short_lists_are_filled_at_the_end():
    nodes = torch.tensor([[1, -1], [-1, -1]])
    scores = torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf]])
    parents, codes, nodes, scores = ops.trie_topk_step(
        torch.zeros(2, 2, 4), nodes, scores, ROW_PTR, CODES, beam_width=3
    )
    assert nodes.tolist() == [[2, -1, -1], [-1, -1, -1]]
    assert codes.tolist() == [[2, 0, 0], [0, 0, 0]]
    assert parents.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert scores[:, 1:].isneginf().all()
    assert scores[1].isneginf().all()


def test_a_child_of_zero_probability_is_still_a_child():
    logits = torch.tensor([[[0.0, 0.0, -torch.inf, 0.0]]])
    *_, nodes, scores = ops.trie_topk_step(logits, torch.tensor([[1]]), torch.zeros(1, 1), ROW_PTR, CODES, beam_width=2)
    assert nodes.tolist() == [[2, -1]]
    assert scores.isneginf().all()


@pytest.mark.parametrize("per_row", [False, True])
def test_forbidden_nodes_are_never_chosen(per_row):
    allowed = torch.tensor([False, True, False, True, True, False])
    if per_row:
        allowed = torch.stack([allowed, ~allowed])
    nodes = torch.tensor([[0, 1, 2]]).repeat(2, 1)
    *_, nodes, _ = ops.trie_topk_step(
        torch.zeros(2, 3, 4), nodes, torch.zeros(2, 3), ROW_PTR, CODES, beam_width=4, node_allowed=allowed
    )
    assert nodes.tolist() == [[1, 3, 4, -1], [0, 2, 5, -1] if per_row else [1, 3, 4, -1]]


def random_case(num_nodes, num_codes, rows, beams, share, seed):
    """A level of a trie and beams on it, some empty; few distinct values, so that ties are common."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(num_nodes, num_codes, generator=generator) < share
    present[0, 0] = True
    row_ptr = torch.nn.functional.pad(present.sum(1).cumsum(0), (1, 0)).int()
    codes = present.nonzero()[:, 1].int()
    nodes = torch.stack([torch.randperm(num_nodes, generator=generator)[:beams].sort().values for _ in range(rows)])
    lengths = torch.randint(nodes.shape[1] + 1, (rows, 1), generator=generator)
    nodes = torch.where(torch.arange(nodes.shape[1]) < lengths, nodes, -1)
    scores = torch.randn(nodes.shape, generator=generator).round()
    logits = torch.randint(0, 3, (*nodes.shape, num_codes), generator=generator).float()
    allowed = torch.rand(rows, len(codes), generator=generator) < 0.7
    return (logits, nodes, scores, row_ptr, codes), allowed


def assert_equals_brute_force(got, expected):
    got = as_lists(*got)
    assert [[entry[:3] for entry in row] for row in got] == [[entry[:3] for entry in row] for row in expected]
    for row, expected_row in zip(got, expected, strict=True):
        assert [entry[3] for entry in row] == pytest.approx([entry[3] for entry in expected_row], abs=1e-5)


@pytest.mark.parametrize("width", [1, 5, 63, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_brute_force(width, dtype):
    (logits, *rest), allowed = random_case(40, 17, 7, 9, 0.4, seed=width)
    for flags in (None, allowed, allowed[0]):
        got = ops.trie_topk_step(logits.to(dtype), *rest, beam_width=width, node_allowed=flags)
        assert_equals_brute_force(got, brute_force(logits.to(dtype), *rest, width, flags))


@settings(max_examples=60, deadline=None)
@given(
    num_nodes=st.integers(1, 12),
    num_codes=st.integers(1, 9),
    rows=st.integers(1, 4),
    beams=st.integers(1, 6),
    share=st.sampled_from([0.1, 0.5, 1.0]),
    width=st.integers(1, 60),
    flags=st.sampled_from(["none", "all rows", "per row"]),
    seed=st.integers(0, 2**20),
)
def test_both_twins_equal_brute_force_and_each_other(num_nodes, num_codes, rows, beams, share, width, flags, seed):
    arguments, allowed = random_case(num_nodes, num_codes, rows, beams, share, seed)
    allowed = {"none": None, "all rows": allowed[0], "per row": allowed}[flags]
    expected = brute_force(*arguments, width, allowed)
    outputs = [twin(*arguments, width, allowed) for twin in (cpu, reference)]
    for output in outputs:
        assert_equals_brute_force(output, expected)
    for one, other in zip(*outputs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("width", [2, 8, 50])
def test_scores_that_are_not_numbers_are_passed_over(value, width):
    arguments, _ = random_case(8, 5, 3, 4, 0.6, seed=1)
    arguments[0][0, 0, 2] = value
    arguments[0][1] = value
    for one, other in zip(cpu(*arguments, width), reference(*arguments, width), strict=True):
        assert torch.equal(one, other)
    assert not ops.trie_topk_step(*arguments, beam_width=width)[3].isnan().any()


def test_compiles_as_one_graph():
    """The reference, which a compiler gets."""
    (logits, *rest), allowed = random_case(8, 5, 3, 4, 0.6, seed=1)

    def step(logits):
        return ops.trie_topk_step(logits, *rest, beam_width=6, node_allowed=allowed)

    for one, other in zip(torch.compile(step, fullgraph=True, backend="eager")(logits), step(logits), strict=True):
        torch.testing.assert_close(one, other)


def test_non_contiguous_and_expanded_inputs():
    logits = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0)).permute(1, 2, 0)
    nodes = torch.tensor([0, 1, 2]).expand(2, 3)
    scores = torch.zeros(1, 1).expand(2, 3)
    got = ops.trie_topk_step(logits, nodes, scores, ROW_PTR, CODES, beam_width=4)
    expected = ops.trie_topk_step(
        logits.contiguous(), nodes.contiguous(), scores.contiguous(), ROW_PTR, CODES, beam_width=4
    )
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_no_rows():
    parents, codes, nodes, scores = ops.trie_topk_step(
        torch.zeros(0, 1, 4), torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1), ROW_PTR, CODES, beam_width=3
    )
    assert parents.shape == codes.shape == nodes.shape == scores.shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3)}, r"logits .*\[B, W, K\]"),
        ({"nodes": torch.zeros(1, 2)}, "nodes as int64"),
        ({"nodes": torch.zeros(1, 3, dtype=torch.int64)}, "nodes"),
        ({"scores": torch.zeros(2, 2)}, "scores"),
        ({"row_ptr": ROW_PTR.long()}, "int32 row_ptr .*int64"),
        ({"edge_codes": CODES[None]}, "edge_codes"),
        ({"beam_width": 0}, "beam_width and edges of at least 1, got 0 and 6"),
        ({"edge_codes": CODES[:0]}, "at least 1, got 2 and 0"),
        ({"node_allowed": torch.ones(5, dtype=torch.bool)}, "node_allowed"),
        ({"node_allowed": torch.ones(6)}, "node_allowed .*bool"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "logits": torch.zeros(1, 2, 4),
        "nodes": torch.tensor([[0, 1]]),
        "scores": torch.zeros(1, 2),
        "row_ptr": ROW_PTR,
        "edge_codes": CODES,
        "beam_width": 2,
    } | change
    with pytest.raises(ValueError, match=message):
        ops.trie_topk_step(**arguments)
