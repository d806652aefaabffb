import pytest

pydantic = pytest.importorskip("pydantic", reason="pydantic comes with requirements-serve.txt")

from serving.requests import ItemsBody, Limits, RecommendBody, RequestError, field_name  # noqa: E402

LIMITS = Limits(max_histories=2, max_history=3, max_k=10, max_listed=2, max_changed=2)


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({}, "histories", "either histories or history"),
        ({"history": ["a"], "histories": [["a"]]}, "histories", "either histories or history"),
        ({"histories": []}, "histories", "at least one history"),
        ({"histories": [["a"]] * 3}, "histories", "at most 2 histories, got 3"),
        ({"histories": [["a"], []]}, "histories[1]", "at least one item key"),
        ({"history": []}, "history", "at least one item key"),
        ({"histories": [["a"], ["a"] * 4]}, "histories[1]", "at most 3 items, got 4"),
        ({"history": ["a"], "k": 11}, "k", "at most 10, got 11"),
        ({"history": ["a"], "allow": ["a"] * 3}, "allow", "at most 2 item keys, got 3"),
        ({"history": ["a"], "deny": ["a"] * 3}, "deny", "at most 2 item keys, got 3"),
        ({"histories": [["a"], ["b"]], "users": ["u"]}, "users", "2 in all, got 1"),
    ],
)
def test_what_types_do_not_say_of_a_recommendation(body, field, message):
    with pytest.raises(RequestError, match=message) as caught:
        RecommendBody.model_validate(body).check(LIMITS)
    assert (caught.value.status, caught.value.field) == (422, field)


def test_what_is_at_the_limits_passes():
    body = {"histories": [["a"] * 3] * 2, "k": 5, "allow": ["a", "b"], "deny": [], "users": [None, "u"]}
    RecommendBody.model_validate(body).check(LIMITS)
    item = {"item_key": "a", "features": [1, 2.5]}
    ItemsBody.model_validate({"add": [item, item]}).check(LIMITS)
    ItemsBody.model_validate({"remove": ["a"]}).check(LIMITS)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "add"),
        ({"add": [], "remove": None}, "add"),
        ({"remove": []}, "remove"),
        ({"add": [{"item_key": "a", "features": [1.0]}], "remove": ["b"]}, "add"),
        ({"remove": ["a", "b", "c"]}, "remove"),
        ({"add": [{"item_key": "a"}]}, "add[0]"),
        ({"add": [{"item_key": "a", "features": [1.0], "text": {}}]}, "add[0]"),
        ({"add": [{"item_key": "a", "features": [1.0]}, {"item_key": "b", "text": {}}]}, "add[1]"),
    ],
)
def test_what_types_do_not_say_of_a_change(body, field):
    with pytest.raises(RequestError) as caught:
        ItemsBody.model_validate(body).check(LIMITS)
    assert (caught.value.status, caught.value.field) == (422, field)


@pytest.mark.parametrize(
    ("body", "location"),
    [
        ({"histories": [["a", 3]]}, "histories[0][1]"),
        ({"histories": "ab"}, "histories"),
        ({"history": ["a"], "k": "5"}, "k"),
        ({"history": ["a"], "k": 0}, "k"),
        ({"history": ["a"], "k": True}, "k"),
        ({"history": ["a"], "exclude_seen": 1}, "exclude_seen"),
        ({"history": ["a"], "topk": 3}, "topk"),
        ({"history": ["a"], "users": [7]}, "users[0]"),
        ([], "body"),
    ],
)
def test_wrong_types_are_named_by_field(body, location):
    with pytest.raises(pydantic.ValidationError) as caught:
        RecommendBody.model_validate(body)
    assert field_name(caught.value.errors()[0]["loc"]) == location


def test_fields_of_items_are_named():
    with pytest.raises(pydantic.ValidationError) as caught:
        ItemsBody.model_validate({"add": [{"item_key": "a", "features": [1.0, "x"]}]})
    assert field_name(caught.value.errors()[0]["loc"]) == "add[0].features[1]"
