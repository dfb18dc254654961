import base64
import gzip
import hashlib
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fuchsia_pl.report.page import render
from fuchsia_pl.report.page.render import render_page

FOLDER = Path(render.__file__).parent
HOSTILE = "</script><script>alert(1)</script><!--{{js}}\ud800\x00\u202e"
ROW = {"id": HOSTILE, "parts": [{"text": HOSTILE, "tokens": [HOSTILE], "gaps": [0.5]}]}


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text of those with an id or of scripts and styles."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.found, self.texts = [("", {})], {}
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        tag, attributes = self.found[-1]
        key = attributes.get("id", tag)
        self.texts[key] = self.texts.get(key, "") + data


def unpacked(page):
    return json.loads(gzip.decompress(base64.b64decode(Elements(page).texts["rollouts"])))


def test_hostile_data_add_no_element_and_come_back_as_they_were():
    plain = Elements(render_page("t", {"a": "b"}, {"rows": []}))
    page = render_page(HOSTILE, {"a": HOSTILE}, {"rows": [ROW], "prompts": [HOSTILE]})
    parsed = Elements(page)
    assert parsed.found == plain.found
    assert json.loads(parsed.texts["summary"]) == {"a": HOSTILE}
    rollouts = unpacked(page)
    assert rollouts["prompts"] == [HOSTILE]
    assert rollouts["rows"][0]["parts"] == [{"text": HOSTILE}]
    assert json.loads(rollouts["rows"][0]["token_data"]) == [[[HOSTILE], None, [0.5]]]
    page.encode("utf-8")  # a lone surrogate would fail


def test_rows_that_are_packed_already_stay_as_they_are():
    row = {"id": "a", "parts": [{"text": "b"}], "token_data": '[[["b"],null,[0.5]]]'}
    assert unpacked(render_page("t", {}, {"rows": [row]}))["rows"] == [row]


def test_the_title_is_text():
    page = render_page("<b>&'\ud800", {}, {"rows": []})
    assert html.unescape(re.search("<title>(.*)</title>", page)[1]) == "<b>&'?"


def test_the_policy_allows_the_own_script_and_style_and_nothing_else():
    page = render_page("t", {}, {"rows": []})
    (policy,) = [a["content"] for _, a in Elements(page).found if a.get("http-equiv") == "Content-Security-Policy"]

    def hash_of(tag):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'",
        "script-src": hash_of("script"),
        "style-src": hash_of("style"),
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_equal_data_give_equal_pages():
    assert render_page("t", {}, {"rows": [ROW]}) == render_page("t", {}, {"rows": [ROW]})


def test_a_number_that_is_not_finite_is_refused():
    """JSON has none: a browser would refuse the whole page."""
    with pytest.raises(ValueError, match="Out of range"):
        render_page("t", {"a": float("nan")}, {"rows": []})


def test_every_file_of_the_page_is_part_of_it():
    names = {str(file.relative_to(FOLDER)) for file in FOLDER.rglob("*") if file.suffix in (".js", ".css")}
    assert names == {*render.SCRIPTS, *render.STYLES}
    assert len(render.SCRIPTS) == len(set(render.SCRIPTS))


@pytest.mark.parametrize("name", [*render.SCRIPTS, *render.STYLES])
def test_no_file_ends_its_element_or_is_long(name):
    text = (FOLDER / name).read_text()
    assert not re.search("</(script|style)|<!--", text, re.IGNORECASE)
    assert text.isascii() or "\r" not in text  # a browser would turn it into a line feed, and the hash would not match
    if not name.startswith("vendor/"):
        assert text.count("\n") <= 400
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)


def test_the_licence_of_the_plot_library_comes_along():
    assert "The MIT License" in (FOLDER / "vendor/uPlot.LICENSE").read_text()
    assert "uPlot (v1.6.32)" in render_page("t", {}, {"rows": []})
