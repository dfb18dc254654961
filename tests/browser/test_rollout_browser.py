"""The browser of rollouts in a real browser: list, filters, groups, tokens, links, keyboard, speed."""

import pytest

from tests.browser.pages import make_rollouts, make_summary

NUM_ROLLOUTS = 10_000
MINUS = "\N{MINUS SIGN}"
VALUES_OF_B = f"token 2: ␣b · advantage {MINUS}1 · gap {MINUS}0.050"


def part(text, **changes):
    return {"role": "assistant", "policy": True, "text": text, **changes}


def make_row(step, item, sibling, reward, text="yes", **changes):
    row = {"id": f"train-{step}-{item}-{sibling}", "split": "train", "step": step, "item": item, "item_row": item}
    row |= {"prompt": item, "environment": 0, "sibling": sibling, "status": "completed", "reward": reward}
    row |= {"rewards": [reward, None], "advantage": None, "version": step, "parts": [part(text)]}
    return {**row, **changes}


def small():
    """Two items at two steps, two siblings each, and a held-out rollout of another environment."""
    rows = [
        make_row(1, 0, 0, 0.0, "the first answer"),
        make_row(1, 0, 1, 1.0, "THE SECOND answer", advantage=0.5),
        make_row(1, 1, 0, 0.5, status="truncated"),
        make_row(1, 1, 1, 0.5),
        make_row(2, 0, 0, 0.25, rewards=[0.25, 0.75]),
        make_row(2, 0, 1, None, status="unscored"),
        make_row(2, 1, 0, -1.0),
        make_row(2, 1, 1, 0.0),
        make_row(0, 0, 0, 1.0, id="validation-0-0-0", split="validation", environment=1, prompt=2),
    ]
    return {
        "prompts": ["Add: 1 + 2", "Add: 3 + 4", "Held out?"],
        "items": ['{"answer": "3"}', '{"answer": "7"}'],
        "environments": ["Arithmetic", "Words"],
        "reward_names": ["correct", "format"],
        "rows": rows,
    }


def listed(page):
    """Titles of the groups in the list."""
    return page.locator("#group-list .option .top span:first-child").all_text_contents()


def fill(page, name, value):
    field = page.locator(f"[name={name}]")
    if field.evaluate("e => e.tagName") == "SELECT":
        field.select_option(value)
    else:
        field.fill(value)
        page.wait_for_timeout(250)


STEPS_AND_ITEMS = ["step 2 · item 0", "step 2 · item 1", "step 1 · item 0", "step 1 · item 1"]
TRAINED = [f"{title} · train · Arithmetic" for title in STEPS_AND_ITEMS]
HELD_OUT = "step 0 · item 0 · validation · Words"


@pytest.mark.parametrize(
    ("filters", "groups", "count"),
    [
        ({}, [*TRAINED, HELD_OUT], "5 groups, 9 rollouts"),
        ({"split": "validation"}, [HELD_OUT], "1 of 5 groups, 1 of 9 rollouts match"),
        ({"environment": "0"}, TRAINED, "4 of 5 groups, 8 of 9 rollouts match"),
        ({"status": "truncated"}, TRAINED[3:], "1 of 5 groups, 1 of 9 rollouts match"),
        ({"stepFrom": "1", "stepTo": "1"}, TRAINED[2:], "2 of 5 groups, 4 of 9 rollouts match"),
        ({"rewardFrom": "0.5"}, [*TRAINED[2:], HELD_OUT], "3 of 5 groups, 4 of 9 rollouts match"),
        ({"rewardTo": "-0.5"}, [TRAINED[1]], "1 of 5 groups, 1 of 9 rollouts match"),
        ({"reward": "1", "rewardFrom": "0"}, [TRAINED[0]], "1 of 5 groups, 1 of 9 rollouts match"),
        ({"text": "second ANSWER"}, [TRAINED[2]], "1 of 5 groups, 1 of 9 rollouts match"),
        ({"text": "3 + 4"}, [TRAINED[1], TRAINED[3]], "2 of 5 groups, 4 of 9 rollouts match"),
        ({"text": '"answer": "7"'}, [TRAINED[1], TRAINED[3]], "2 of 5 groups, 4 of 9 rollouts match"),
        ({"text": "(.*"}, [], "0 of 5 groups, 0 of 9 rollouts match"),
        ({"sort": "high", "split": "train"}, [TRAINED[2], TRAINED[3], TRAINED[0], TRAINED[1]], None),
        ({"sort": "low", "split": "train"}, [TRAINED[1], TRAINED[0], TRAINED[2], TRAINED[3]], None),
        ({"sort": "first"}, [HELD_OUT, *TRAINED[2:], *TRAINED[:2]], None),
        ({"sort": "spread", "stepFrom": "1"}, [TRAINED[1], TRAINED[2], TRAINED[0], TRAINED[3]], None),
        ({"sort": "long", "stepFrom": "1"}, [TRAINED[2], TRAINED[0], TRAINED[1], TRAINED[3]], None),
    ],
)
def test_filters_and_order_of_the_groups(opened, filters, groups, count):
    page = opened(None, small())
    for name, value in filters.items():
        fill(page, name, value)
    assert listed(page) == groups
    if count:
        assert page.locator("#count").text_content() == count
    page.get_by_role("button", name="clear").click()
    assert listed(page) == [*TRAINED, HELD_OUT]


def test_a_filter_dims_siblings_that_do_not_match(opened):
    page = opened(None, small())
    fill(page, "text", "second")
    assert page.locator(".card.unmatched").get_attribute("aria-label") == "Rollout 0, reward 0, worst"


def test_a_group_has_its_prompt_item_siblings_and_its_best_and_worst(opened):
    page = opened(None, small(), hash="#r=train-1-0-1")
    view = page.locator("#group-view")
    assert "step 1 · item 0" in view.locator("h3").first.text_content()
    assert "mean reward 0.500, spread 1.000" in view.text_content()
    assert view.locator(".prompt-box .text").first.text_content() == "Add: 1 + 2"
    view.get_by_text("item", exact=True).click()
    assert '{"answer": "3"}' in view.locator(".prompt-box").text_content()
    assert view.locator(".card .parts").all_text_contents() == ["the first answer", "THE SECOND answer"]
    assert view.locator(".card.best .reward").text_content() == "1.000"
    assert view.locator(".card.worst .reward").text_content() == "0.000"
    view.get_by_role("button", name="2", exact=True).click()  # the same item at step 2
    assert "step 2 · item 0" in view.locator("h3").first.text_content()
    assert view.locator(".card .badge").all_text_contents() == ["unscored"]  # one scored sibling is not the best of any


def test_equal_siblings_are_neither_best_nor_worst(opened):
    page = opened(None, small(), hash="#r=train-1-1-0")
    assert "all equal" in page.locator("#group-view").text_content()
    assert page.locator(".card.best, .card.worst").count() == 0
    assert page.get_by_role("button", name="best").is_disabled()


def colours(page, card=0):
    return page.locator(".card").nth(card).locator(".t").evaluate_all("all => all.map((e) => e.className)")


def test_tokens_are_coloured_by_advantage_or_gap_with_values_on_demand(opened):
    """Levels are fifths of the group's largest absolute value: 1 for advantages, 0.1 for gaps."""
    tokens = ["a", " b", "\n", "c", "d"]
    text = "".join(tokens)
    values = {"tokens": tokens, "advantages": [1.0, -1.0, 0.5, 0.0, -0.1], "gaps": [0.1, -0.05, None, 0.001, 0.0]}
    rollouts = small()
    rollouts["rows"] = [
        make_row(1, 0, 0, 1.0, parts=[part(text, **values)]),
        make_row(1, 0, 1, 0.0, advantage=-0.3, parts=[part("xy", tokens=["x", "y"]), part("z")]),
    ]
    page = opened(None, rollouts)
    assert colours(page) == ["t p5", "t n5", "t p3 newline", "t", "t n1"]
    assert colours(page, 1) == ["t n2", "t n2"]  # the rollout's advantage, where tokens have none
    assert page.locator(".card").nth(1).locator(".text").last.get_attribute("class") == "text n2"
    page.locator(".card .t").nth(1).hover()
    assert page.locator("#readout").text_content() == VALUES_OF_B
    page.get_by_label("Colour tokens by").select_option("gap")
    assert colours(page) == ["t p5", "t n3", "t newline", "t", "t"]
    assert "+0.100" in page.locator(".scale").text_content()
    block = page.locator(".card .text").first
    block.focus()
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    assert page.locator("#readout").text_content() == VALUES_OF_B
    page.get_by_label("Colour tokens by").select_option("none")
    assert colours(page) == ["t", "t", "t newline", "t", "t"]


def test_environment_text_is_grey_and_calls_and_results_are_blocks(opened):
    call = {"name": "python", "arguments": '{"code": "x = 1\\nprint(x)"}'}
    parts = [
        part("I compute. "),
        part("<call>", call=call),
        {"role": "tool", "policy": False, "text": "42"},
        {"role": "user", "policy": False, "text": "Go on."},
    ]
    rollouts = {**small(), "rows": [make_row(1, 0, 0, 1.0, advantage=1.0, parts=parts)]}
    page = opened(None, rollouts)
    assert page.locator(".part.call").text_content() == "→ call python<call>codex = 1\nprint(x)"
    assert page.locator(".part.result").text_content() == "← result42"
    muted = page.evaluate("colour('--muted')")
    grey = page.locator(".part.environment .text").evaluate_all("all => all.map((e) => getComputedStyle(e).color)")
    assert grey == [muted, muted]
    assert "p5" not in page.locator(".part.environment .text").last.get_attribute("class")


def test_a_permanent_link_opens_its_rollout_whatever_is_filtered(opened):
    page = opened(None, small(), hash="#r=train-1-1-1")
    assert page.locator(".card.target").get_attribute("aria-label").startswith("Rollout 1, reward 0.500")
    assert page.locator(".option[aria-selected=true]").text_content().startswith("step 1 · item 1")
    fill(page, "split", "validation")
    page.evaluate("location.hash = '#r=train-2-1-0'")
    page.wait_for_timeout(200)
    assert page.locator(".card.target").get_attribute("aria-label") == f"Rollout 0, reward {MINUS}1, worst"
    page.locator(".card.target .copy-link").click()
    page.wait_for_timeout(200)
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == page.url.split("#")[0] + "#r=train-2-1-0"
    page.evaluate("location.hash = '#r=train-9-9-9'")
    page.wait_for_timeout(200)
    assert "not in this report" in page.get_by_role("alert").text_content()
    page.evaluate("location.hash = '#r=%'")  # no text in UTF-8
    page.wait_for_timeout(100)
    assert page.get_by_role("alert").count() == 1


def test_everything_works_by_keyboard(opened):
    page = opened(None, small())
    title = page.locator("#group-view h3").first
    press = page.keyboard.press
    press("j")
    assert "step 2 · item 1" in title.text_content()
    press("k")
    press("k")  # the first stays the first
    assert "step 2 · item 0" in title.text_content()
    press("j")
    press("j")
    press("b")
    assert page.evaluate("document.activeElement.className") == "card best target"
    press("w")
    assert page.evaluate("document.activeElement.className") == "card worst target"
    press("n")
    assert page.evaluate("document.activeElement.ariaLabel").startswith("Rollout 1")
    press("a")
    assert page.get_by_label("Colour tokens by").input_value() == "gap"
    press("/")
    page.keyboard.type("jk held")
    assert page.locator("#search").input_value() == "jk held"  # letters in a field are text
    press("Escape")
    assert page.evaluate("document.activeElement.id") == "group-list"
    press("?")
    assert page.locator("#help").is_visible()
    press("j")
    press("Escape")
    assert not page.locator("#help").is_visible()
    page.get_by_role("button", name="clear").click()
    page.locator("#group-list").focus()
    press("End")
    assert "step 0 · item 0" in title.text_content()
    assert page.locator("#group-list").get_attribute("aria-activedescendant") == "option-4"
    press("ArrowUp")
    assert "step 1 · item 1" in title.text_content()
    press("t")
    assert page.locator("html").get_attribute("data-theme") == "light"


def test_the_focus_is_visible_and_the_first_tab_skips_to_the_curves(opened):
    page = opened(None, small())
    page.keyboard.press("Tab")
    link = page.locator(":focus")
    assert link.text_content() == "Skip to the curves"
    assert link.bounding_box()["y"] >= 0
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.locator(":focus").get_attribute("id") == "smoothing"
    assert page.locator(":focus").evaluate("e => getComputedStyle(e).outlineStyle") == "solid"


def test_every_control_has_a_name(opened):
    page = opened(None, small())
    unnamed = """all => all.filter((e) => e.checkVisibility() && !(e.textContent.trim() && e.tagName != "SELECT")
      && !e.ariaLabel && !e.labels?.length).map((e) => e.outerHTML)"""
    assert page.locator("button, input, select, a").evaluate_all(unnamed) == []


def test_the_search_marks_what_it_found(opened):
    page = opened(None, small(), hash="#r=train-1-0-0")
    fill(page, "text", "answer")
    found = page.evaluate("[...CSS.highlights.get('found')].map((range) => range.toString())")
    assert found == ["answer"] * 3  # one is in the item


def test_a_sample_of_the_rollouts_says_so(opened):
    summary = make_summary(num_rollouts=25_600, num_shown=9, shown_words="the first and last steps whole")
    page = opened(summary, small())
    assert page.locator("#shown-words").text_content() == "9 of 25,600 rollouts: the first and last steps whole"


def test_ten_thousand_rollouts_load_within_three_seconds_and_scroll(opened):
    """From the start of the navigation until the browser of rollouts answers. The best of three: the machine may be busy."""
    group_size = 8
    rollouts = make_rollouts(num_groups=NUM_ROLLOUTS // group_size, group_size=group_size, num_items=50)
    for row in rollouts["rows"]:  # as long as a short answer: 96 tokens
        row["parts"] = [{**one, "tokens": one["tokens"] * 4, "gaps": one["gaps"] * 4} for one in row["parts"]]
        row["parts"][0]["text"] *= 4
    page = opened(None, rollouts)
    assert page.locator("#count").text_content() == "1,250 groups, 10,000 rollouts"
    seconds = []
    for _ in range(3):
        seconds.append(page.evaluate("performance.getEntriesByName('ready')[0].startTime") / 1000)
        if seconds[-1] < 3:
            break
        page.reload()
        page.wait_for_selector("html[data-ready]")
    assert min(seconds) < 3
    assert page.locator(".option").count() < 40
    page.locator("#group-list").focus()
    page.keyboard.press("End")
    assert page.locator(".option[aria-selected=true]").get_attribute("aria-posinset") == "1250"
    fill(page, "text", "12 plus 30")
    assert "of 10,000 rollouts match" in page.locator("#count").text_content()


def test_a_running_report_loads_itself_again_and_keeps_what_was_shown(opened):
    summary = make_summary()
    summary["runs"][0]["status"]["outcome"] = "running"
    page = opened(summary, small())
    page.get_by_role("button", name="Load the report again").click()
    assert page.locator("#reload-toggle").text_content() == "paused"
    fill(page, "split", "train")
    page.keyboard.press("Escape")
    page.get_by_label("Colour tokens by").select_option("gap")
    page.evaluate("browser.move(2)")
    with page.expect_navigation():
        page.evaluate("window.old = true; reloadPage()")
    page.wait_for_selector("html[data-ready]", timeout=30_000)
    assert page.evaluate("window.old") is None
    assert page.locator("#group-view h3").first.text_content().startswith("step 1 · item 0")
    assert page.locator("[name=split]").input_value() == "train"
    assert page.get_by_label("Colour tokens by").input_value() == "gap"
    assert page.locator("#reload-toggle").text_content() == "paused"


def test_rewards_of_turns_are_beside_the_reward_of_their_function(opened):
    rollouts = small()
    rollouts["reward_names"] = ["constructor"]  # a name that every object of the page has too
    rollouts["rows"] = [
        make_row(1, 0, 0, 3.0, rewards=[3], turn_rewards={"constructor": [2, None, 1]}),
        make_row(1, 0, 1, 5.0, rewards=[5], turn_rewards={"other": [1]}),
        make_row(1, 0, 2, 7.0, rewards=[7]),
    ]
    facts = opened(None, rollouts).locator(".card-facts")
    assert "constructor 3 (turns 2, \N{EN DASH}, 1)" in facts.nth(0).text_content()
    assert "turns" not in facts.nth(1).text_content() + facts.nth(2).text_content()
