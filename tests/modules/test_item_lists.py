import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.schemas import InputError
from modules.item_lists import ItemLists

ITEM_IDS = {key: item_id for item_id, key in enumerate("abcdef")}
KEYS = st.lists(st.sampled_from("abcdef"), max_size=4)
LISTS = st.none() | KEYS | st.lists(st.none() | KEYS, min_size=3, max_size=3)


def sets_of(keys, num_rows=3):
    """What a list says row by row, written down as simply as possible."""
    if keys is None or all(isinstance(key, str) for key in keys):
        return [None if keys is None else set(keys)] * num_rows
    return [None if row is None else set(row) for row in keys]


@given(allow=LISTS, deny=LISTS, excluded=st.lists(KEYS, min_size=3, max_size=3))
def test_every_row_may_get_what_is_allowed_less_what_is_denied_or_excluded(allow, deny, excluded):
    item_filter = ItemLists(ITEM_IDS).item_filter(
        [[ITEM_IDS[key] for key in row] for row in excluded], allow=allow, deny=deny
    )
    expected = [
        (set(ITEM_IDS) if allowed is None else allowed) - (denied or set()) - set(row)
        for allowed, denied, row in zip(sets_of(allow), sets_of(deny), excluded, strict=True)
    ]
    if item_filter is None:
        assert expected == [set(ITEM_IDS)] * 3
    else:
        flags = item_filter.flags(len(ITEM_IDS)).tolist()
        assert [{key for key, flag in zip(ITEM_IDS, row, strict=True) if flag} for row in flags] == expected


def test_nothing_said_is_no_filter():
    lists = ItemLists(ITEM_IDS)
    assert lists.item_filter([[], []]) is None
    assert lists.item_filter([], allow=["a"]).flags(6).shape == (0, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"allow": "abc"}, "allow expected a collection of item keys, such as a list, got 'abc'"),
        ({"deny": iter("abc")}, "deny expected a collection of item keys"),
        ({"deny": [["a"], "b"]}, "deny expected item keys, or a list of one collection .* got a mixture"),
        ({"allow": [["a"], None, ["b"]]}, "allow expected one collection of item keys or None per history, 2, got 3"),
    ],
)
def test_bad_lists_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        ItemLists(ITEM_IDS).item_filter([[], []], **arguments)


def test_unknown_keys_are_skipped_with_a_warning_per_list():
    with pytest.warns(UserWarning, match="skipped") as caught:
        item_filter = ItemLists(ITEM_IDS).item_filter([[], []], allow=["x", "a", "y"], deny=[["z"], ["z", "b"]])
    assert [str(warning.message) for warning in caught] == [
        "skipped 2 item keys of allow that the catalogue of 6 items does not have: x, y",
        "skipped 1 item keys of deny that the catalogue of 6 items does not have: z",
    ]
    assert item_filter.flags(6).nonzero().tolist() == [[0, 0], [1, 0]]


def test_a_frozenset_is_read_once_until_the_catalogue_grows():
    item_ids = dict(ITEM_IDS)
    lists, allow = ItemLists(item_ids), frozenset({"a", "x"})
    with pytest.warns(UserWarning, match="skipped 1 item keys of allow"):
        first = lists.item_filter([[]], allow=allow)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lists.item_filter([[]], allow=allow).allowed is first.allowed
    item_ids["x"] = 6
    assert lists.item_filter([[]], allow=allow).allowed.tolist() == [True, *[False] * 5, True]
    keys = ["a"]
    before = lists.item_filter([[]], allow=keys).allowed
    keys.append("b")  # a list may change, and is read every time
    assert not torch.equal(lists.item_filter([[]], allow=keys).allowed, before)


def test_a_collection_that_rows_share_is_read_once():
    class Counted(list):
        reads = 0

        def __iter__(self):
            self.reads += 1
            return super().__iter__()

    lists, shared = ItemLists({"a": 0, "b": 1, "c": 2}), Counted(["a", "b"])
    lists.item_filter([[]], allow=[shared])
    reads_of_one_row, shared.reads = shared.reads, 0
    found = lists.item_filter([[0], [1], [], []], allow=[shared, shared, ["c"], shared])
    assert shared.reads == reads_of_one_row
    assert found.flags(3).int().tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 1, 0]]
