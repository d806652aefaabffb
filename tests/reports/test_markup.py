import json

import pytest

from reports.markup import Markup, element, join, json_script


def test_text_is_escaped_and_markup_is_not():
    inner = element("b", "<i>&'\"")
    assert inner == "<b>&lt;i&gt;&amp;&#x27;&quot;</b>"
    assert element("p", "a < b ", inner) == f"<p>a &lt; b {inner}</p>"
    assert join(inner, "<") == f"{inner}&lt;"
    assert isinstance(element("p"), Markup)


def test_attributes():
    made = element("a", class_="x y", aria_label='"quoted" <b>', data_label=None, open="")
    assert made == '<a class="x y" aria-label="&quot;quoted&quot; &lt;b&gt;" open=""></a>'


def test_data_cannot_end_its_element():
    content = {"title": "</script><!-- <script> é"}
    script = json_script("data", content)
    assert script.startswith('<script type="application/json" id="data">')
    inside = script.removeprefix('<script type="application/json" id="data">').removesuffix("</script>")
    assert "<" not in inside
    assert json.loads(inside) == content


def test_data_that_is_no_json_is_refused():
    with pytest.raises(ValueError, match="JSON compliant"):
        json_script("data", [float("nan")])
