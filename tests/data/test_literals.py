import ast
import json
import random

import pytest

from data.sources.literals import literal_values
from data.sources.records import clean_price, clean_text, whole_characters

NAMES = ("username", "text", "hours", "product_id", "early_access", "date")
LINES = [
    "{u'username': u'Chaos Syren', u'hours': 0.1, u'early_access': False, u'text': u'fun', u'date': u'2017-12-17'}",
    r"""{u'text': u"it's \u2665 'great', u'username': u'fake'", u'username': u'x\\y', u'hours': 1e-05}""",
    "{'text': 'plain', \"username\": \"it's\", 'hours': -3, 'early_access': True, 'date': None}",
    "{u'tags': [u'Indie', u'RPG'], u'username': u'nested', u'hours': 2}",
    "{u'username': u'spaces' , u'hours' : 2}",
    "{u'username': u'twice', u'username': u'last'}",
    "{u'other': 1}",
]


@pytest.mark.parametrize("line", LINES)
def test_values_are_those_of_literal_eval(line):
    record = ast.literal_eval(line)
    assert literal_values(line, NAMES) == {name: record[name] for name in NAMES if name in record}


def test_random_dicts_as_repr_writes_them():
    draw = random.Random(0)
    letters = "ab'\"\\{}[],: u\n\t\u2665\u00e9"
    for _ in range(300):
        record = {
            "".join(draw.choices("abc", k=2)): draw.choice(
                ["".join(draw.choices(letters, k=draw.randrange(9))), draw.random(), -draw.randrange(9), True, None]
            )
            for _ in range(draw.randrange(1, 6))
        }
        for line in (repr(record), ascii(record)):
            assert literal_values(line, list(record)) == record


@pytest.mark.parametrize(
    "line",
    [
        "{u'username': u'cut",
        "{u'username': u'x', u'hours': }",
        r"{u'username': u'half an escape \x4', u'hours': 1}",
        r"{u'username': u'\N{no such name}', u'hours': 1}",
        "{u'username': u'\\n and a line end \r', u'hours': 1}",
        "{u'username': u'x', u'hours': 007}",
        f"{{u'username': u'x', u'hours': {'1' * 5000}}}",
        "{u'username': u'x', u'hours': 1} trailing",
        "{u'username': u'x', u'hours': __import__('os').getpid()}",
        "[1, 2]",
        "u'username': u'x'",
        "{}}",
        "not a dict",
    ],
)
def test_what_is_no_dict_is_none(line):
    assert literal_values(line, NAMES) is None


def test_json_objects_are_read_too():
    assert literal_values(json.dumps({"username": "x", "hours": None}), NAMES) == {"username": "x", "hours": None}


def test_texts_of_narrow_python_builds_and_web_pages():
    assert whole_characters("\ud83d\ude00 ok \ud83d") == "\U0001f600 ok \ufffd"
    assert clean_text(" Design &amp;\n Illustration ") == "Design & Illustration"
    assert clean_text("  ") is clean_text(3) is None


def test_prices():
    assert [clean_price(price) for price in (0, 4.99, 999_999)] == [0.0, 4.99, 999_999.0]
    for price in (-1, 10**400, float("inf"), float("nan"), True, "4.99", None):
        assert clean_price(price) is None
