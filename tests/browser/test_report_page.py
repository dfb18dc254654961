"""Status, curves, evaluations and configuration of the report in a real browser."""

import pytest

from tests.browser.pages import evaluation, make_rollouts, make_run, make_summary

WARNING = {
    "step": 18,
    "name": "kl_growing",
    "metric": "train/kl",
    "text": "KL has grown from 0.05 to 0.45 in 10 steps.",
    "advice": "Lower the learning rate.",
}
FEW = make_rollouts(num_groups=2)


def chart(page, title):
    return page.locator("figure.chart", has=page.get_by_text(title, exact=True))


def titles(page):
    return page.locator("figure.chart:visible figcaption bdi").all_text_contents()


def painted(page, title):
    """How many pixels of a chart's canvas are not transparent."""
    canvas = chart(page, title).locator("canvas").first
    count = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 == 3 && v > 0).length"
    return canvas.evaluate(count)


def test_the_header_tells_how_the_run_stands_and_what_is_wrong(opened):
    run = make_run(warnings=[WARNING])
    words = "Running: step 18 of 25."
    run["status"].update(outcome="running", words=words, step=18, seconds=144.0, seconds_left=40.0)
    page = opened(make_summary(run), FEW)
    header = page.locator("#status")
    assert header.locator("h1").text_content() == "quickstart/0"
    assert words in header.text_content()
    assert "2 min 24 s so far" in header.text_content()
    assert "about 40 s left" in header.text_content()
    assert header.get_by_role("progressbar").get_attribute("aria-valuenow") == "18"
    warning = header.locator(".warning")
    assert WARNING["text"] in warning.text_content()
    assert WARNING["advice"] in warning.text_content()
    warning.get_by_role("link", name="train/kl").click()
    assert page.evaluate("document.activeElement.textContent").startswith("KL to the reference")


def test_a_mixture_and_a_curriculum_have_charts_of_their_own(opened):
    run = make_run()
    for part, height in {"sums": 0.5, "words": 0.2}.items():
        for name in ("reward/mean", "rollout/accuracy"):
            run["metrics"][f"{part}/{name}"] = [height + 0.01 * step for step in range(25)]
        for one in run["evaluations"]:
            one["figures"][f"{part}/rollout/accuracy"] = {"value": height, "low": height - 0.1, "high": height + 0.1}
    run["metrics"]["curriculum/level_chain_sum"] = [float(step // 8) for step in range(25)]
    run["metrics"]["curriculum/inside"] = [0.9] * 25
    page = opened(make_summary(run), FEW)
    wanted = ["reward by part", "accuracy by part", "held-out accuracy by part", "levels", "items by success"]
    assert set(wanted) <= set(titles(page))
    assert all(painted(page, title) > 500 for title in wanted)
    legend = chart(page, "levels").text_content()
    assert "chain_sum" in legend
    assert "curriculum/" not in legend
    assert all(f"{part}/reward/mean" in chart(page, "reward by part").text_content() for part in ("sums", "words"))


def test_curves_are_drawn_and_charts_without_data_are_not_there(opened):
    run = make_run()
    run["metrics"]["train/value_loss"] = [None] * 25
    del run["metrics"]["train/entropy"]
    page = opened(make_summary(run), FEW)
    shown = titles(page)
    wanted = {"reward", "rewards by name", "accuracy", "pass@k, maj@k, mean@k", "KL to the reference", "clip fraction"}
    wanted |= {"tokens of a completion", "truncated", "trainer/sampler gap", "sampler weight and ratio", "memory"}
    assert wanted | {"seconds of a step"} <= set(shown)
    assert "entropy" not in shown
    assert all(painted(page, title) > 500 for title in shown)
    page.get_by_text("more (2)").click()
    assert {"train/loss", "count/tool_calls"} <= set(titles(page))
    assert "train/value_loss" not in titles(page)
    page.wait_for_timeout(100)
    assert painted(page, "train/loss") > 500


def test_a_legend_has_the_last_values_and_those_at_the_cursor(opened):
    run = make_run(num_steps=4, evaluations=[])
    run["metrics"] = {"reward/a": [0.125, 0.25, 0.5, None], "reward/b": [1.0, 2.0, 3.0, 4.0]}
    page = opened(make_summary(run), FEW)
    legend = chart(page, "rewards by name").locator(".legend")
    assert legend.text_content() == "a0.500b4"
    chart(page, "rewards by name").focus()
    for key in ("Home", "ArrowRight"):
        page.keyboard.press(key)
    assert legend.text_content() == "a0.250b2"
    assert chart(page, "rewards by name").locator(".at").text_content() == "step 2"
    page.keyboard.press("Escape")
    assert legend.text_content() == "a0.500b4"
    button = legend.get_by_role("button").first
    before = painted(page, "rewards by name")
    button.click()
    page.wait_for_timeout(100)
    assert button.get_attribute("aria-pressed") == "false"
    assert painted(page, "rewards by name") < before


def test_the_stack_of_durations_ends_at_the_duration_of_a_step(opened):
    run = make_run(num_steps=2, evaluations=[])
    names = ["perf/rollout_seconds", "perf/train_seconds", "sync/seconds", "perf/step_seconds"]
    run["metrics"] = {name: [value] * 2 for name, value in zip(names, [2.0, 1.5, 0.25, 4.0], strict=True)}
    run["metrics"]["perf/train_tokens_per_s"] = [9.0, 9.0]
    page = opened(make_summary(run), FEW)
    parts = chart(page, "seconds of a step").locator(".legend button").all_text_contents()
    assert parts == ["rollout2", "train1.50", "sync0.250", "other0.250"]
    tops = page.evaluate("shownCharts.find(({spec}) => spec.stacked).u.data.slice(1).map((column) => column[0])")
    assert tops == [2.0, 3.5, 3.75, 4.0]


def test_several_runs_are_laid_over_each_other(opened):
    other = make_run("dapo/1", seed=3, num_steps=30)
    page = opened(make_summary(make_run(), other), FEW)
    assert chart(page, "KL to the reference").locator(".legend .name").all_text_contents() == ["quickstart/0", "dapo/1"]
    assert "reward/correct" in titles(page)  # named rewards have a chart each
    assert page.evaluate("shownCharts[0].spec.xs").__len__() == 31  # 0 is the evaluation before training
    before = painted(page, "entropy")
    page.locator(".run-legend").get_by_role("button", name="dapo/1").click()
    page.wait_for_timeout(100)
    assert painted(page, "entropy") < before


def test_smoothing_is_an_average_that_starts_at_the_first_value(opened):
    run = make_run(num_steps=3, evaluations=[], metrics={"train/kl": [1.0, 3.0, None]})
    page = opened(make_summary(run), FEW)
    page.locator("#smoothing").select_option(label="light")
    smooth = page.evaluate("shownCharts[0].spec.series[0].values")
    # weights 0.4 and 0.6 * 0.4 of the last and the one before, divided by their sum 0.64
    assert smooth == [1.0, pytest.approx((0.4 * 3 + 0.24 * 1) / 0.64), None]


def test_every_evaluation_is_in_the_table_with_its_interval(opened):
    series = [evaluation(0, 0.0), evaluation(10, 0.8), evaluation(20, 0.4), evaluation(20, 0.2, "Other")]
    page = opened(make_summary(make_run(evaluations=series)), FEW)
    rows = page.locator("#evaluation-table tbody tr")
    assert rows.count() == 4
    cells = rows.nth(1).locator("td").all_text_contents()
    assert cells[:5] == ["10", "validation", "Arithmetic", "64 \N{MULTIPLICATION SIGN} 4", "0.556[0.466, 0.656]"]
    assert rows.nth(1).get_attribute("class") == "best"
    assert page.locator("tr.best").count() == 1


def test_figures_without_interval_and_number_of_items_are_shown(opened):
    """Held-out figures of runs that have no file of evaluations."""
    figures = {"rollout/accuracy": {"value": 0.25, "low": None, "high": None}}
    series = [{**evaluation(step, 0.0), "figures": figures, "num_items": None, "num_samples": None} for step in (0, 5)]
    page = opened(make_summary(make_run(evaluations=series)), FEW)
    assert "0.250 → 0.250at step 5" in page.locator(".tile").first.text_content()
    assert chart(page, "accuracy").locator(".legend").text_content().startswith("validation0.250training")
    assert page.locator("#evaluation-table tbody tr").first.text_content().endswith("0.250")


def test_the_configuration_shows_what_differs_and_is_filtered(opened):
    page = opened(make_summary(), FEW)
    keys = page.locator("#config-table tbody th")
    assert keys.all_text_contents() == [
        "data.batch_size",
        "model.objective.beta",
        "model.policy.name",
        "trainer.max_steps",
    ]
    page.locator("#only-changed").uncheck()
    assert keys.count() == 6
    page.locator("#config-filter").fill("GRADIENT")
    assert keys.all_text_contents() == ["trainer.gradient_clip_val"]


def test_settings_of_several_runs_are_compared(opened):
    other = make_run("other/0")
    other["config"][0] = {"key": "data.batch_size", "value": "16", "default": "4"}
    page = opened(make_summary(make_run(), other), FEW)
    assert page.locator("#config-table tbody tr").all_text_contents() == ["data.batch_size8164"]


def test_a_run_before_its_first_step_has_a_page(opened):
    run = make_run(num_steps=0, metrics={}, evaluations=[], config=[])
    run["status"].update(outcome="unknown", words="No step yet.", max_steps=None, seconds=None, started_at=None)
    empty = {"prompts": [], "items": [], "environments": [], "reward_names": [], "rows": []}
    page = opened(make_summary(run), empty)
    assert "No step has been logged yet." in page.locator("#charts").text_content()
    assert "There are no rollouts yet." in page.locator("#rollout-browser").text_content()


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_light_and_dark_follow_the_system_and_the_button(opened):
    assert background(opened(None, FEW)) == "rgb(250, 249, 251)"
    page = opened(None, FEW, scheme="dark")
    assert background(page) == "rgb(19, 17, 22)"
    pixel = "document.querySelector('canvas').getContext('2d').getImageData(0, 0, 300, 160).data.join()"
    dark = page.evaluate(pixel)
    page.get_by_role("button", name="Colour theme").click()
    assert background(page) == "rgb(250, 249, 251)"
    assert page.evaluate(pixel) != dark  # the curves are redrawn


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(opened, scheme):
    """Each colour of text against each background it lies on: 4.5 to 1, the bar of WCAG AA."""
    page = opened(None, FEW, scheme=scheme)
    ratio = """([ink, ground]) => {
      const light = (name) => {
        const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const [r, g, b] = colour(name).match(/[\\d.]+/g).map((v) => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
      };
      const [a, b] = [light(ink), light(ground)];
      return Math.max(a, b) / Math.min(a, b);
    }"""
    pairs = [(ink, ground) for ink in ("--ink", "--muted", "--accent") for ground in ("--bg", "--panel", "--sunken")]
    low = {pair: page.evaluate(ratio, list(pair)) for pair in [*pairs, ("--warn", "--panel"), ("--bad", "--bg")]}
    assert {pair: value for pair, value in low.items() if value < 4.5} == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_no_width_needs_a_horizontal_scroll(opened, width, scheme):
    run = make_run("a-long-name-of-a-config-" * 4 + "/0", warnings=[{**WARNING, "text": "x" * 300}])
    run["config"].append({"key": "data.environment.init_args." + "x" * 80, "value": "y" * 200, "default": None})
    page = opened(make_summary(run), FEW, width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
