"""Texts of a policy, a dataset and a user that try to do more than be read."""

import pytest

from tests.browser.pages import make_run, make_summary

SCRIPT = "</script><script>document.title = 'owned'; alert(1)</script>"
IMAGE = '<img src="http://127.0.0.1:9/x.png" onerror="document.title = \'owned\'">'
STYLE = "</style><style>body { display: none }</style><link rel=stylesheet href=http://127.0.0.1:9/x.css>"
TEMPLATE = "{{js}} {{rollouts}} ${alert(1)} <!-- ]]> &lt;b&gt;"
HOSTILE = [
    SCRIPT,
    IMAGE,
    STYLE,
    TEMPLATE,
    "a\ud800b",
    "\udfff",
    "nul \x00 \x1b[31m \r\x07",
    "\u202eright to left\u2066",
]


def hostile_rollouts(texts):
    rows = [
        {
            "id": f"train-1-0-{i} {text[:50]}",
            "split": text,
            "step": 1,
            "item": 0,
            "item_row": 0,
            "prompt": 0,
            "environment": 0,
            "sibling": i,
            "status": text,
            "reward": float(i),
            "rewards": [float(i)],
            "advantage": 1.0,
            "version": 0,
            "parts": [
                {"role": "assistant", "policy": True, "text": text, "tokens": [text[:9], text[9:]], "gaps": [0.1, 0.2]},
                {"role": text, "policy": False, "text": text, "call": {"name": text, "arguments": text}},
                {"role": "tool", "policy": False, "text": text},
            ],
        }
        for i, text in enumerate(texts)
    ]
    everything = " ".join(texts)
    return {
        "prompts": [everything],
        "items": [everything],
        "environments": [everything],
        "reward_names": [everything],
    } | {"rows": rows}


def hostile_run(text):
    warning = {"step": 1, "name": text, "metric": text, "text": text, "advice": text}
    figures = {text: {"value": 0.5, "low": 0.1, "high": 0.9}, "reward/mean": {"value": 0.5, "low": 0.1, "high": 0.9}}
    evaluation = {"step": 1, "split": text, "environment": text, "num_items": 1, "num_samples": 1, "figures": figures}
    run = make_run(text, num_steps=2, warnings=[warning], evaluations=[evaluation], folder=text, objective=text)
    run["config"] = [{"key": text, "value": text, "default": text + "!"}]
    run["metrics"] |= {f"reward/{text}": [0.1, 0.2], text: [1.0, 2.0]}
    run["status"].update(words=text, reason=text, outcome=text, started_at=text)
    return run


@pytest.mark.parametrize(
    "text", HOSTILE, ids=["script", "image", "style", "template", "high", "low", "control", "bidi"]
)
def test_hostile_text_is_shown_and_does_nothing(opened, text):
    """The fixture fails on any console error, dialog or request."""
    page = opened(make_summary(hostile_run(text), version=text), hostile_rollouts([text, "plain"]))
    page.wait_for_timeout(100)
    assert page.title() == "quickstart/0"
    assert page.locator("main img, main script, main style, main link").count() == 0
    assert page.locator("script").count() == 3
    assert page.locator("#group-view .card").count() == 1  # its split differs from that of the plain one
    shown = page.evaluate("visible(JSON.parse(document.getElementById('summary').textContent).runs[0].name)")
    assert page.locator("h1").text_content() == " ".join(shown.split()) or text.startswith("nul")
    assert page.evaluate("document.documentElement.scrollWidth") == 1280


def test_what_is_invisible_or_reorders_is_shown_as_a_symbol(opened):
    text = "a\x00b\x1bc\u202ed\u200be\ud800f\U000e0041g\u2067h\r\ni\tj k\u200dl"
    page = opened(None, hostile_rollouts([text]))
    expected = "a␀b␛c⟨U+202E⟩d⟨U+200B⟩e⟨U+D800⟩f⟨U+E0041⟩g⟨U+2067⟩h␍\ni\tj k\u200dl"
    assert page.locator(".card .part.policy .text").text_content() == expected


def test_text_from_right_to_left_stays_in_its_element(opened):
    hebrew = "\u05e9\u05dc\u05d5\u05dd 12"
    rollouts = hostile_rollouts([hebrew])
    page = opened(make_summary(hostile_run(hebrew)), rollouts)
    isolation = "all => all.map((e) => getComputedStyle(e).unicodeBidi)"
    assert set(page.locator("bdi, .text").evaluate_all(isolation)) <= {"isolate", "plaintext"}
    assert page.locator(".card .part.policy .text").evaluate("e => getComputedStyle(e).direction") == "rtl"
    for row in ("h1", ".status-line", ".card-head", ".tile"):
        assert page.locator(row).first.evaluate("e => getComputedStyle(e).direction") == "ltr"


def test_a_megabyte_is_folded_and_shown_in_pieces(opened):
    """In one piece, as one token, as many tokens, without any space."""
    million = "x" * 1_000_000
    rollouts = hostile_rollouts(["short"])
    row = rollouts["rows"][0]
    row["parts"] = [
        {"role": "assistant", "policy": True, "text": million},
        {"role": "assistant", "policy": True, "text": million, "tokens": [million], "gaps": [0.1]},
        {"role": "assistant", "policy": True, "text": million, "tokens": ["x" * 10] * 100_000, "gaps": [0.1] * 100_000},
    ]
    page = opened(None, rollouts)
    lengths = (
        "all => all.map((e) => [...e.querySelectorAll('.text')].reduce((sum, e) => sum + e.textContent.length, 0))"
    )
    parts = page.locator(".card .part")
    assert parts.evaluate_all(lengths) == [6000, 1001, 6000]  # a token of a megabyte is cut
    assert page.evaluate("document.documentElement.scrollWidth") == 1280
    page.locator(".card .more").first.click()
    page.locator(".card .more").last.click()
    assert parts.evaluate_all(lengths) == [106_000, 1001, 106_000]
    assert page.locator(".card .more").first.text_content() == "… show more of 1,000,000 characters"
    page.evaluate("for (let i = 0; i < 9; i++) document.querySelector('.card .more').click()")
    assert parts.evaluate_all(lengths) == [1_000_000, 1001, 106_000]
    assert page.locator(".card .more").count() == 1


def test_data_that_cannot_be_unpacked_are_reported(opened, chromium, tmp_path):
    """A report that was cut off, for example by a full disk."""
    from tests.browser.pages import write_page

    file = tmp_path / "broken.html"
    write_page(file)
    text = file.read_text()
    start = text.index('id="rollouts">') + len('id="rollouts">')
    file.write_text(text[:start] + text[start + 400 :])
    page = chromium.new_page()
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready]")
    assert "The rollouts cannot be shown" in page.get_by_role("alert").text_content()
    assert page.locator("figure.chart").count() > 5
    page.close()
