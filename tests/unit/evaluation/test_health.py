"""Detectors of what is wrong with a run: each fires on its illness, and none on a healthy run."""

import csv
import math
import random
from pathlib import Path

import pytest

from fuchsia_pl.evaluation.health import NAMES, Finding, find_illnesses, learning_rate
from fuchsia_pl.evaluation.history import History, step_row

QUICKSTART = Path(__file__).with_name("quickstart.csv")  # metrics of the run in the picture of README.md
WINDOW, FLAT_STEPS = 4, 20


def after(*phases: tuple[int, dict[str, float]]) -> list[Finding]:
    """The findings after phases of a number of equal steps each."""
    history = History(WINDOW, FLAT_STEPS)
    for number, row in phases:
        for _ in range(number):
            history.add(row)
    return find_illnesses(history)


def names(*phases) -> list[str]:
    return [finding.name for finding in after(*phases)]


# Illness, rows of the start, rows of now, and rows of now that are just within the limits.
CASES = {
    "kl_growing": ({"train/kl": 0.7}, {"train/kl": 1.51}, {"train/kl": 1.5}),
    "kl_growing, but no longer": ({"train/kl": 1.2}, {"train/kl": 1.81}, {"train/kl": 1.79}),
    "gap_growing": ({"train/logprob_gap": 0.05}, {"train/logprob_gap": 0.11}, {"train/logprob_gap": 0.09}),
    "gap_growing, from a high start": (
        {"train/logprob_gap": 0.06},
        {"train/logprob_gap": 0.12},
        {"train/logprob_gap": 0.119},
    ),
    "gap_growing, with stale weights": (
        {"train/logprob_gap": 0.05, "rollout/staleness": 2.0},
        {"train/logprob_gap": 0.31, "rollout/staleness": 2.0},
        {"train/logprob_gap": 0.29, "rollout/staleness": 2.0},
    ),
    "entropy_collapsed": ({"train/entropy": 0.5}, {"train/entropy": 0.04}, {"train/entropy": 0.06}),
    "entropy_collapsed, from a low start": (
        {"train/entropy": 0.1},
        {"train/entropy": 0.019},
        {"train/entropy": 0.021},
    ),
    "entropy_collapsed, but the task is learned": (
        {"train/entropy": 0.5},
        {"train/entropy": 0.01, "rollout/accuracy": 0.89},
        {"train/entropy": 0.01, "rollout/accuracy": 0.91},
    ),
    "lengths_exploding": (
        {"rollout/completion_tokens": 100.0, "rollout/truncated_fraction": 0.0},
        {"rollout/completion_tokens": 200.0, "rollout/truncated_fraction": 0.25},
        {"rollout/completion_tokens": 199.0, "rollout/truncated_fraction": 0.25},
    ),
    "lengths_exploding, but the limit is not reached": (
        {"rollout/completion_tokens": 100.0, "rollout/truncated_fraction": 0.2},
        {"rollout/completion_tokens": 900.0, "rollout/truncated_fraction": 0.36},
        {"rollout/completion_tokens": 900.0, "rollout/truncated_fraction": 0.34},
    ),
    "no_spread": ({"equal_groups": 0.3}, {"equal_groups": 0.96}, {"equal_groups": 0.94}),
    "all_truncated": (
        {"rollout/truncated_fraction": 0.3},
        {"rollout/truncated_fraction": 0.99},
        {"rollout/truncated_fraction": 0.97},
    ),
    "clip_fraction_high": ({"train/clip_fraction": 0.1}, {"train/clip_fraction": 0.31}, {"train/clip_fraction": 0.3}),
    "staleness_high": (
        {"rollout/staleness": 1.0},
        {"rollout/staleness": 4.1},
        {"rollout/staleness": 4.0, "stale_rows": 0.1},
    ),
    "staleness_high, by dropped rows": (
        {"rollout/staleness": 1.0},
        {"rollout/staleness": 1.0, "stale_rows": 0.11},
        {"rollout/staleness": 1.0, "stale_rows": 0.09},
    ),
    "reward_dominates": (
        {},
        {"spread/a": 0.96, "varying/a": 1.0, "spread/b": 0.04, "varying/b": 0.5},
        {"spread/a": 0.94, "varying/a": 1.0, "spread/b": 0.06, "varying/b": 0.5},
    ),
    "reward_dominates, but the others do not vary": (
        {},
        {"spread/a": 0.97, "varying/a": 1.0, "spread/b": 0.03, "varying/b": 0.5},
        {"spread/a": 0.97, "varying/a": 1.0, "spread/b": 0.03, "varying/b": 0.4},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_illness_is_found_beyond_its_limits_only(case):
    start, ill, well = CASES[case]
    assert names((WINDOW, start), (WINDOW, ill)) == [case.partition(",")[0]]
    assert names((WINDOW, start), (WINDOW, well)) == []


def test_a_reward_that_has_not_risen_after_many_steps_is_flat():
    def steps(number, rise, accuracy=0.2):
        noise = [0.0, 0.1]  # the differences are 0.1: their noise is 1.4826 * 0.1 / sqrt(2) = 0.105, half of it 0.052
        return [
            (1, {"reward/mean": noise[n % 2] + (rise if n >= WINDOW else 0.0), "rollout/accuracy": accuracy})
            for n in range(number)
        ]

    assert names(*steps(FLAT_STEPS - 1, 0.0)) == []
    assert names(*steps(FLAT_STEPS, 0.0)) == ["reward_flat"]
    assert names(*steps(FLAT_STEPS, 0.05)) == ["reward_flat"]
    assert names(*steps(FLAT_STEPS, 0.06)) == []
    assert names(*steps(FLAT_STEPS, -0.5)) == ["reward_flat"]
    assert names(*steps(FLAT_STEPS, 0.0, accuracy=0.95)) == []
    (finding,) = after(*steps(FLAT_STEPS, 0.0))
    assert finding.text.startswith("reward/mean is 0.05 after 20 steps and was 0.05 at the start; it varies by 0.1 ")


def test_a_learned_reward_that_stays_is_not_flat():
    assert names((WINDOW, {"reward/mean": 0.1}), (200, {"reward/mean": 0.8})) == []


def test_one_step_is_no_illness():
    well = {"train/kl": 0.1, "train/entropy": 0.5, "train/clip_fraction": 0.0, "train/logprob_gap": 0.02}
    ill = {"train/kl": 50.0, "train/entropy": 0.0, "train/clip_fraction": 1.0, "train/logprob_gap": 5.0}
    assert names((WINDOW, well), (1, ill), (WINDOW - 2, well)) == []


def test_every_finding_has_numbers_a_metric_and_advice():
    found = {finding.name: finding for start, ill, _ in CASES.values() for finding in after((4, start), (4, ill))}
    found["reward_flat"] = after((FLAT_STEPS, {"reward/mean": 0.1}))[0]
    found["learning_rate"] = learning_rate(1.0, "AdamW")
    assert sorted(found) == sorted(NAMES)
    for finding in found.values():
        assert any(character.isdigit() for character in finding.text)
        assert "/" in finding.metric
        assert finding.advice[0].isupper()
        assert "\n" not in finding.text + finding.advice


@pytest.mark.parametrize(
    ("rate", "optimizer", "words"),
    [
        (9e-7, "AdamW", "hardly learns below 1e-06"),
        (1e-6, "AdamW", None),
        (1e-2, "AdamW8bit", None),
        (1.1e-2, "Adam", "diverges above 0.01"),
        (0.1, "SGD", None),
        (1e-8, "SGD", None),
    ],
)
def test_a_rate_ten_times_outside_of_the_usual_range_is_found(rate, optimizer, words):
    finding = learning_rate(rate, optimizer)
    assert (finding is not None) == (words is not None)
    assert words is None or words in finding.text


def test_a_finding_is_worse_at_twice_the_level():
    finding = Finding("kl_growing", "train/kl", "", "", level=2.0)
    assert (finding.is_worse_than(1.0), finding.is_worse_than(1.1)) == (True, False)
    assert not Finding("no_spread", "", "", "").is_worse_than(0.0)


def healthy(numbers: random.Random, num_steps: int) -> list[dict[str, float]]:
    """Metrics of a run that learns, with noise of each step around trends. The trends cover what good runs show."""
    first, last = sorted((numbers.uniform(0.0, 0.85), numbers.uniform(0.15, 1.0)))
    last = max(last, first + 0.15)
    middle, speed = numbers.uniform(5, 60), numbers.uniform(4, 25)
    noise = numbers.uniform(0.005, (last - first) / 4)
    kl, gap, beta = numbers.uniform(0.001, 0.9), numbers.uniform(0.005, 0.07), numbers.random() < 0.7
    entropy = numbers.uniform(0.2, 2.0)
    entropy_end = entropy * numbers.uniform(0.21, 1.2)
    length, growth = numbers.uniform(10, 2000), numbers.uniform(0.4, 4.0)
    truncated = numbers.uniform(0.0, 0.5)
    truncated_end = truncated * numbers.uniform(0.0, 1.0)
    clip, lag = numbers.uniform(0.0, 0.18), numbers.choice([0, 0, 1, 2])
    equal = numbers.uniform(0.0, 0.6)
    share = numbers.uniform(0.5, 0.85)
    rows = []

    def around(value: float, part: float = 0.15) -> float:
        return max(0.0, value * (1.0 + numbers.gauss(0.0, part)))

    for step in range(num_steps):
        done = 1.0 / (1.0 + math.exp((middle - step) / speed))
        reward = first + (last - first) * done + numbers.gauss(0.0, noise)
        row = {
            "reward/mean": reward,
            "rollout/accuracy": min(max(reward, 0.0), 1.0),
            "rollout/truncated_fraction": min(1.0, around(truncated + (truncated_end - truncated) * done)),
            "rollout/completion_tokens": around(length * (1.0 + (growth - 1.0) * done)),
            "rollout/staleness": float(min(step, lag)),
            "stale_rows": numbers.choice([0.0, 0.0, 0.02]),
            "train/logprob_gap": around(gap) * (1 + min(step, lag)),
            "train/entropy": around(entropy + (entropy_end - entropy) * done),
            "train/clip_fraction": around(clip, 0.4),
            "equal_groups": min(0.9, around(equal, 0.3)),
            "spread/a": min(0.94, around(share, 0.05)),
            "spread/b": 0.1,
            "varying/a": 0.8,
            "varying/b": 0.7,
        }
        if beta:
            row["train/kl"] = around(kl * (1.0 - math.exp(-step / speed)), 0.3)
        rows.append({name: value for name, value in row.items() if numbers.random() > 0.01})
    return rows


def test_no_healthy_history_gives_a_warning():
    for seed in range(60):
        history = History(window=10, flat_steps=100)
        for step, row in enumerate(healthy(random.Random(seed), num_steps=160)):
            history.add(row)
            assert find_illnesses(history) == [], f"seed {seed}, step {step}"


@pytest.mark.parametrize("window", [2, 4, 10])
def test_the_quickstart_gives_no_warning(window):
    """Its reward rises from 0.1 to 0.8 in 25 steps, its KL to 0.7."""
    history = History(window, flat_steps=20)
    with QUICKSTART.open() as stream:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]
    assert len(rows) == 25
    for row in rows:
        history.add(step_row(row, num_groups=8, num_rows=64))
        assert find_illnesses(history) == []


def worsening(name: str, numbers: random.Random) -> list[dict[str, float]]:
    """A healthy history whose one metric goes wrong from step 60 on."""
    rows = healthy(numbers, num_steps=160)
    for step, row in enumerate(rows):
        part = max(0.0, (step - 60) / 100)
        if name == "kl_growing":
            row["train/kl"] = row.get("train/kl", 0.1) * math.exp(8 * part) + 0.01
        elif name == "gap_growing":
            row["train/logprob_gap"] = row.get("train/logprob_gap", 0.03) + part
        elif name == "entropy_collapsed":
            row["train/entropy"] = row.get("train/entropy", 0.3) * math.exp(-8 * part)
            row["rollout/accuracy"] = 0.5
        elif name == "lengths_exploding":
            row["rollout/completion_tokens"] = row.get("rollout/completion_tokens", 50.0) * (1 + 20 * part)
            row["rollout/truncated_fraction"] = min(1.0, row.get("rollout/truncated_fraction", 0.1) + 0.9 * part)
        elif name == "reward_flat":
            row["reward/mean"] = 0.3 + numbers.gauss(0.0, 0.02)
            row["rollout/accuracy"] = 0.3
    return rows


@pytest.mark.parametrize("name", ["kl_growing", "gap_growing", "entropy_collapsed", "lengths_exploding", "reward_flat"])
def test_an_illness_is_found_among_the_noise_of_a_run(name):
    for seed in range(8):
        history, found = History(window=10, flat_steps=100), set()
        for row in worsening(name, random.Random(seed)):
            history.add(row)
            found |= {finding.name for finding in find_illnesses(history)}
        assert name in found, f"seed {seed}"
