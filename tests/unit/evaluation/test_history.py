"""Windows over the metrics of a run."""

import json

import pytest

from fuchsia_pl.evaluation.history import History, reward_spreads, step_row


def filled(values, window=2, flat_steps=4, name="train/kl") -> History:
    history = History(window, flat_steps)
    for value in values:
        history.add({} if value is None else {name: value})
    return history


def test_a_figure_needs_its_whole_windows():
    """The start is known once it no longer overlaps the newest window."""
    figures = []
    for number in range(1, 6):
        history = filled([1.0, 2.0, 4.0, 8.0, 16.0][:number])
        figures.append((history.at_start("train/kl"), history.before("train/kl"), history.now("train/kl")))
    assert figures == [(None, None, None), (None, None, 1.5), (None, None, 3.0), (1.5, 1.5, 6.0), (1.5, 3.0, 12.0)]


def test_a_metric_that_most_steps_lack_has_no_figure():
    assert filled([None, 2.0, 3.0, 5.0], window=4, flat_steps=8).now("train/kl") == 3.0
    assert filled([None, None, 4.0, 5.0], window=4, flat_steps=8).now("train/kl") is None
    assert filled([1.0] * 4).now("train/entropy") is None


def test_a_skipped_step_has_no_figures_of_tokens_and_numbers_that_are_not_finite_are_left_out():
    metrics = {"reward/mean": float("nan"), "train/entropy": 0.0, "train/kl": 0.0, "rollout/accuracy": 0.5}
    assert step_row({**metrics, "train/skipped": 1.0}, 4, 32) == {"rollout/accuracy": 0.5}
    assert step_row({**metrics, "train/skipped": 0.0}, 4, 32) == {
        "rollout/accuracy": 0.5,
        "train/entropy": 0.0,
        "train/kl": 0.0,
    }


def test_shares_count_refilled_groups_and_dropped_rows():
    row = step_row(
        {"rollout/zero_variance_groups": 3.0, "rollout/refilled_groups": 2.0, "rollout/stale": 8.0}, 4, num_rows=32
    )
    assert row == {"equal_groups": 0.5, "stale_rows": 0.25}


def test_a_rewards_share_of_the_spread_is_that_of_its_weighted_deviation():
    # a: deviations 0.5 and 0, weight 1; b: deviations 2 and 2, weight 0.25; c does not vary.
    groups = [
        [{"a": 0.0, "b": 0.0, "c": 1.0}, {"a": 1.0, "b": 4.0, "c": 1.0}],
        [{"a": 1.0, "b": 4.0, "c": 1.0}, {"a": 1.0, "b": 0.0, "c": None}],
    ]
    row = reward_spreads(groups, {"a": 1.0, "b": -0.25, "c": 1.0}.__getitem__)
    assert row["spread/a"] == pytest.approx(0.5 / 1.5)
    assert row["spread/b"] == pytest.approx(1.0 / 1.5)
    assert (row["spread/c"], row["varying/a"], row["varying/b"], row["varying/c"]) == (0.0, 0.5, 1.0, 0.0)
    assert reward_spreads([[{"a": 1.0}, {"a": 1.0}]], lambda name: 1.0) == {}


def test_a_restored_history_continues_as_the_original():
    values = [0.1 * n for n in range(9)]
    whole, first = filled(values), filled(values[:5])
    restored = History(2, 4)
    restored.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for value in values[5:]:
        restored.add({"train/kl": value})
    assert restored.state_dict() == whole.state_dict()


def test_a_history_with_other_windows_starts_from_the_newest_rows():
    restored = History(3, 6)
    restored.load_state_dict(filled([1.0, 2.0, 3.0, 4.0, 5.0], window=2, flat_steps=4).state_dict())
    for value in (6.0, 7.0, 8.0):
        restored.add({"train/kl": value})
    assert (restored.at_start("train/kl"), restored.now("train/kl")) == (3.0, 7.0)
