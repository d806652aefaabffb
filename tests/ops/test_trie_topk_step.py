import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ops
from ops import LeafFilter
from ops.cpu.trie_topk_step import trie_topk_step as cpu
from ops.reference.trie_topk_step import trie_topk_step as reference
from tests.ops.leaf_filters import leaf_filter_of, random_leaf_begins, random_leaf_filter, reachable

HALVES = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
ROW_PTR = torch.tensor([0, 2, 3, 6], dtype=torch.int32)
"""Three nodes; children: node 0 by codes 0, 3; node 1 by code 2; node 2 by codes 0, 1, 2."""
CODES = torch.tensor([0, 3, 2, 0, 1, 2], dtype=torch.int32)


def brute_force(logits, nodes, scores, row_ptr, codes, width, normalize="level", leaf_filter=None, leaf_begins=None):
    """Every candidate of every row in a Python list, sorted by (-score, edge); the best kept, in edge order."""
    begins = list(range(len(codes) + 1)) if leaf_begins is None else leaf_begins.tolist()
    lists = []
    for row in range(len(nodes)):
        permitted = None if leaf_filter is None else reachable(leaf_filter, row, begins[-1])
        candidates = []
        for beam, node in enumerate(nodes[row].tolist()):
            edges = range(int(row_ptr[node]), int(row_ptr[node + 1])) if node >= 0 else ()
            own = logits[row, beam].float()
            over = {"level": own, "children": own[codes[edges.start : edges.stop].long()] if edges else own}
            for edge in edges:
                if permitted is None or permitted & set(range(begins[edge], begins[edge + 1])):
                    code = int(codes[edge])
                    value = own[code] if normalize == "none" else own[code] - over[normalize].logsumexp(0)
                    candidates.append((-float(scores[row, beam] + value), edge, beam, code))
        best = sorted(candidate for candidate in candidates if candidate[0] == candidate[0])[:width]
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


def test_children_normalisation_by_hand():
    """After node 0 its children 0 (1/2) and 3 (1/8) share everything; after node 1 the only child has it."""
    logits = torch.stack([HALVES, HALVES])[None]
    nodes, scores = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]).log()
    *_, found, scores = ops.trie_topk_step(logits, nodes, scores, ROW_PTR, CODES, beam_width=3, normalize="children")
    assert found.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(scores.exp(), torch.tensor([[0.5 * 4 / 5, 0.5 * 1 / 5, 0.25]]))


def test_without_normalisation_logits_are_added():
    logits = torch.tensor([[[1.0, 9.0, 9.0, -3.0]]])
    nodes, scores = torch.tensor([[0]]), torch.tensor([[0.5]])
    *_, found, scores = ops.trie_topk_step(logits, nodes, scores, ROW_PTR, CODES, beam_width=2, normalize="none")
    assert found.tolist() == [[0, 1]]
    assert scores.tolist() == [[1.5, -2.5]]


def test_a_filter_changes_no_score():
    for normalize in ("level", "children"):
        leaf_filter = leaf_filter_of([{0}], [False])
        arguments = HALVES.view(1, 1, 4), torch.tensor([[0]]), torch.zeros(1, 1), ROW_PTR, CODES
        *_, every = ops.trie_topk_step(*arguments, beam_width=2, normalize=normalize)
        *_, found, some = ops.trie_topk_step(*arguments, beam_width=2, normalize=normalize, leaf_filter=leaf_filter)
        assert found.tolist() == [[1, -1]]
        assert some[0, 0] == every[0, 1]


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_filtered_leaves_are_never_reached(dtype):
    """Six children with two leaves each: 0 1, 2 3, ... Leaf 5 is for nobody."""
    allowed = [leaf != 5 for leaf in range(12)]
    sets = [{2, 3, 4, 10}, {2, 11}, set(), set()]  # all of child 1; with leaf 5, all of child 2; half of child 5
    leaf_filter = leaf_filter_of(sets, [False, True, False, True], allowed, tail=2)
    leaf_begins = torch.arange(7, dtype=torch.int32) * 2
    *_, found, _ = ops.trie_topk_step(
        torch.zeros(4, 3, 4),
        torch.tensor([[0, 1, 2]]).repeat(4, 1),
        torch.zeros(4, 3),
        ROW_PTR,
        CODES.to(dtype),
        beam_width=6,
        leaf_filter=leaf_filter,
        leaf_begins=leaf_begins,
    )
    assert found.tolist() == [[0, 3, 4, 5, -1, -1], [1, 5, -1, -1, -1, -1], [0, 1, 2, 3, 4, 5], [-1] * 6]


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
    return logits, nodes, scores, row_ptr, codes


def assert_equals_brute_force(got, expected):
    got = as_lists(*got)
    assert [[entry[:3] for entry in row] for row in got] == [[entry[:3] for entry in row] for row in expected]
    for row, expected_row in zip(got, expected, strict=True):
        assert [entry[3] for entry in row] == pytest.approx([entry[3] for entry in expected_row], abs=1e-5)


@pytest.mark.parametrize("width", [1, 5, 63, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_brute_force(width, dtype):
    logits, *rest = random_case(40, 17, 7, 9, 0.4, seed=width)
    for leaf_filter in (None, random_leaf_filter(7, len(rest[3]))):
        got = ops.trie_topk_step(logits.to(dtype), *rest, beam_width=width, leaf_filter=leaf_filter)
        assert_equals_brute_force(got, brute_force(logits.to(dtype), *rest, width, leaf_filter=leaf_filter))


@settings(max_examples=80, deadline=None)
@given(
    num_nodes=st.integers(1, 12),
    num_codes=st.integers(1, 9),
    rows=st.integers(1, 4),
    beams=st.integers(1, 6),
    share=st.sampled_from([0.1, 0.5, 1.0]),
    width=st.integers(1, 60),
    normalize=st.sampled_from(["level", "children", "none"]),
    listed=st.sampled_from([None, 0.0, 0.3, 1.0]),
    flags=st.booleans(),
    edges_are_leaves=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_both_twins_equal_brute_force_and_each_other(
    num_nodes, num_codes, rows, beams, share, width, normalize, listed, flags, edges_are_leaves, seed
):
    logits, *rest = random_case(num_nodes, num_codes, rows, beams, share, seed)
    if normalize == "children":  # exponentials without rounding, so that the order in which they are added is no matter
        logits = torch.where(logits == 0, -torch.inf, 0.0)
    leaf_begins = None if edges_are_leaves else random_leaf_begins(len(rest[3]), seed)
    num_leaves = len(rest[3]) if leaf_begins is None else int(leaf_begins[-1])
    leaf_filter = None if listed is None else random_leaf_filter(rows, num_leaves, share=listed, flags=flags, seed=seed)
    arguments = (logits, *rest, width, normalize, leaf_filter, leaf_begins)
    expected = brute_force(*arguments)
    outputs = [twin(*arguments) for twin in (cpu, reference)]
    for output in outputs:
        assert_equals_brute_force(output, expected)
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0 if normalize == "none" else 1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("width", [2, 8, 50])
@pytest.mark.parametrize("normalize", ["level", "children", "none"])
def test_scores_that_are_not_numbers_are_passed_over(value, width, normalize):
    arguments = random_case(8, 5, 3, 4, 0.6, seed=1)
    arguments[0][0, :, 2] = value
    arguments[0][1] = value
    for one, other in zip(cpu(*arguments, width, normalize), reference(*arguments, width, normalize), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert not ops.trie_topk_step(*arguments, beam_width=width, normalize=normalize)[3].isnan().any()


@pytest.mark.parametrize("twin", [cpu, reference])
def test_both_zeros_are_equal(twin):
    logits, nodes = torch.tensor([[[-0.0, 0.0, -0.0, 0.0]]]), torch.tensor([[2]])
    row_ptr, codes = torch.tensor([0, 0, 0, 4], dtype=torch.int32), torch.arange(4, dtype=torch.int16)
    found = twin(logits, nodes, torch.full((1, 1), -0.0), row_ptr, codes, 2, "none")[2]
    assert found.tolist() == [[0, 1]]


def test_compiles_as_one_graph():
    """The reference, which a compiler gets."""
    logits, *rest = random_case(8, 5, 3, 4, 0.6, seed=1)
    leaf_filter = random_leaf_filter(3, len(rest[3]))

    def step(logits):
        return ops.trie_topk_step(logits, *rest, beam_width=6, normalize="children", leaf_filter=leaf_filter)

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
        ({"edge_codes": CODES.long()}, "int16 or int32 edge_codes, .*int64"),
        ({"normalize": "softmax"}, "one of level, children, none, got 'softmax'"),
        ({"leaf_begins": ROW_PTR}, r"leaf_begins as int32 \[7\], got \[4\] int32"),
        ({"leaf_filter": leaf_filter_of([{0}, {1}], [True, True])}, r"leaf_filter.offsets of shape \[2\] for 1 rows"),
        ({"leaf_filter": leaf_filter_of([{0}], [True, True])}, r"leaf_filter.only of shape \[1\] for 1 rows"),
        (
            {"leaf_filter": LeafFilter(torch.tensor([0, 1]).int(), torch.tensor([0]), torch.tensor([True]))},
            "leaf_filter.leaves of one dimension and torch.int32, got .*int64",
        ),
        (
            {"leaf_filter": LeafFilter(torch.tensor([0, 2]).int(), torch.tensor([0]).int(), torch.tensor([True]))},
            "leaf_filter.offsets rising from 0 to at most the 1 packed",
        ),
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
