"""Items drawn by their success: rates, the band, rechecks, fills, and runs that repeat bit for bit."""

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback

from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.callbacks.run_checkpoint import RunCheckpoint
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.rollouts.choice import PhaseSizes
from fuchsia_pl.rollouts.config import CurriculumConfig
from fuchsia_pl.rollouts.curriculum import Curriculum, updated_rates
from fuchsia_pl.rollouts.ranks import Ranks
from fuchsia_pl.rollouts.shares import Pool
from fuchsia_pl.samples import RolloutGroup
from fuchsia_pl.types import ConfigError, Rollout
from tests.doubles import TinyEngine, TinyEnvironment, make_data, make_module, make_trainer

ONE = Ranks(0, 1, reduce=lambda values, how: values)
BAND = CurriculumConfig(band=(0.2, 0.8), decay=0.5, recheck_phases=5)


class Judged(TinyEnvironment):
    """A rollout is correct if its first reward is above 0."""

    def is_correct(self, rollout):
        return rollout.rewards["even"] > 0


def make_curriculum(num_items=20, batch_size=4, config=BAND, pools=None, **sizes) -> Curriculum:
    pools = pools or [Pool("", 1.0, list(range(num_items)))]
    return Curriculum(config, pools, PhaseSizes(3, batch_size, **sizes), num_items, Judged())


def group(item: int, *rewards: float | None) -> RolloutGroup:
    made = [Rollout({}, item, n, 1.0, "", rewards={"even": r}, reward=r) for n, r in enumerate(rewards)]
    return RolloutGroup(tuple(made), has_spread=len(set(rewards)) > 1)


def drawn(curriculum: Curriculum, phase: int) -> list[int]:
    curriculum.plan(phase)
    return curriculum.choice(phase).drawn


def test_a_rate_is_the_running_mean_of_the_share_of_successes():
    curriculum = make_curriculum()
    curriculum.observe(0, [group(4, 1.0, 1.0, 0.0, 0.0), group(5, 0.0, 0.0), group(6, None, None)], ONE)
    curriculum.observe(1, [group(4, 1.0, 1.0, None, 1.0)], ONE)
    # item 4: 2 of 4, then 3 of 3 scored: 0.5 x 0.5 + 0.5 x 1
    assert curriculum.rates[4] == 0.75
    assert curriculum.rates[5] == 0.0
    assert curriculum.rates[[6, 7]].isnan().all()
    assert curriculum.last[[4, 5, 6, 7]].tolist() == [1, 0, 0, -1]


def test_the_decay_is_the_weight_of_the_earlier_rate():
    rates, measured = torch.tensor([0.5], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    assert [updated_rates(rates, measured, decay).item() for decay in (0.0, 0.8)] == pytest.approx([1.0, 0.6])


def test_success_is_the_judgement_of_the_environment_or_a_threshold_of_the_total_reward():
    by_reward = make_curriculum(config=CurriculumConfig(success=0.6))
    by_environment = make_curriculum()
    for curriculum in (by_reward, by_environment):
        curriculum.observe(0, [group(0, 0.5, 0.7, 0.6, 0.0)], ONE)
    assert (by_reward.rates[0], by_environment.rates[0]) == (0.5, 0.75)


def test_ranks_add_up_their_counts():
    first, second = make_curriculum(), make_curriculum()
    shares = [[group(0, 1.0, 0.0)], [group(1, 1.0, 1.0)]]
    counted = []
    for curriculum, share in zip((first, second), shares, strict=True):
        curriculum.observe(0, share, Ranks(0, 2, lambda values, how: counted.append(values) or values))
    both = make_curriculum()
    both.observe(0, [], Ranks(0, 2, lambda values, how: counted[0] + counted[1]))
    assert both.rates[:2].tolist() == [0.5, 1.0]


def test_items_outside_the_band_wait_and_come_back():
    curriculum = make_curriculum(num_items=8, batch_size=4)
    # of 8 items, 0 is always solved and 1 never; the others are half solved
    share = {0: (1.0, 1.0), 1: (0.0, 0.0)}
    times: dict[int, list[int]] = {item: [] for item in range(8)}
    for phase in range(42):
        for item in drawn(curriculum, phase):
            times[item].append(phase)
        curriculum.observe(
            phase, [group(item, *share.get(item, (0.0, 1.0))) for item in curriculum.choice(phase).drawn], ONE
        )
    for item in (0, 1):
        gaps = [later - now for now, later in zip(times[item], times[item][1:], strict=False)]
        assert min(gaps) >= 5
        assert max(gaps) <= 6  # one recheck a phase, and two items may be due in the same one
    assert min(len(times[item]) for item in range(2, 8)) > 2 * max(len(times[0]), len(times[1]))
    metrics = curriculum.choice(41).metrics
    assert [metrics[f"curriculum/{name}"] for name in ("inside", "below", "above", "unseen")] == [
        0.75,
        0.125,
        0.125,
        0.0,
    ]


def test_an_item_that_changes_is_drawn_as_usual_again():
    curriculum = make_curriculum(num_items=8, batch_size=4)
    for phase in range(30):
        half = phase >= 10
        drawn(curriculum, phase)
        groups = [group(i, *((0.0, 1.0) if i or half else (0.0, 0.0))) for i in curriculum.choice(phase).drawn]
        curriculum.observe(phase, groups, ONE)
    assert 0.2 <= curriculum.rates[0] <= 0.8
    assert sum(0 in drawn(curriculum, phase) for phase in range(30, 50)) >= 6  # outside the band it would be 4


def test_every_item_is_drawn_once_before_any_comes_again():
    curriculum = make_curriculum(num_items=20, batch_size=4)
    assert sorted(item for phase in range(5) for item in drawn(curriculum, phase)) == list(range(20))
    companions = {frozenset(drawn(curriculum, phase)) for phase in range(5, 60)}
    assert len(companions) > 45  # of 55: the items of a phase do not meet again in every pass


def test_too_few_items_inside_are_filled_with_the_nearest_and_counted():
    curriculum = make_curriculum(num_items=6, batch_size=4, config=CurriculumConfig(recheck_phases=100))
    rates = [0.5, 0.95, 0.1, 0.0, 1.0, 0.15]  # distances 0, 0.15, 0.1, 0.2, 0.2, 0.05
    curriculum.rates = torch.tensor(rates, dtype=torch.float64)
    curriculum.last[:] = 0
    assert set(drawn(curriculum, 1)) == {0, 5, 2, 1}
    assert curriculum.choice(1).metrics["curriculum/filled"] == 3.0
    assert curriculum.choice(1).metrics["curriculum/rechecks"] == 0.0


def test_more_items_that_are_due_than_there_is_room_for_are_counted():
    curriculum = make_curriculum(num_items=40, batch_size=8, config=CurriculumConfig(recheck_phases=2))
    curriculum.rates = torch.tensor([0.5] * 20 + [0.0] * 20, dtype=torch.float64)
    curriculum.last[:] = 0
    found = drawn(curriculum, 3)
    assert sum(item >= 20 for item in found) == 2  # a quarter of 8
    metrics = curriculum.choice(3).metrics
    assert (metrics["curriculum/rechecks"], metrics["curriculum/overdue"]) == (2.0, 18.0)


RATES = st.lists(st.one_of(st.just(float("nan")), st.floats(0.0, 1.0)), min_size=8, max_size=40)


@settings(max_examples=50, deadline=None)
@given(RATES, st.integers(1, 8), st.integers(0, 50), st.integers(1, 10))
def test_any_rates_give_a_phase_of_different_items_that_repeats(rates, batch_size, phase, recheck_phases):
    def chosen(seed_of_last: int):
        config = CurriculumConfig(recheck_phases=recheck_phases)
        curriculum = make_curriculum(len(rates), batch_size, config, has_spare=True)
        curriculum.rates = torch.tensor(rates, dtype=torch.float64)
        curriculum.last = torch.arange(len(rates)) % (phase + 1) - seed_of_last
        curriculum.plan(phase)
        return curriculum.choice(phase)

    choice = chosen(1)
    assert choice == chosen(1)
    assert len(set(choice.drawn)) == batch_size
    assert sorted([*choice.drawn, *choice.spare]) == list(range(len(rates)))
    outside = [item for item in choice.drawn if rates[item] < 0.2 or rates[item] > 0.8]
    metrics = choice.metrics
    assert len(outside) == metrics["curriculum/rechecks"] + metrics["curriculum/filled"]
    num_inside = sum(not (rate < 0.2 or rate > 0.8) for rate in rates)
    assert metrics["curriculum/filled"] == max(batch_size - metrics["curriculum/rechecks"] - num_inside, 0)


def test_spare_items_begin_with_those_inside_the_band():
    curriculum = make_curriculum(num_items=10, batch_size=2, has_spare=True)
    curriculum.rates = torch.tensor([0.5] * 6 + [0.0, 0.1, 0.95, 1.0], dtype=torch.float64)
    curriculum.last[:] = 0
    curriculum.plan(1)
    spare = curriculum.choice(1).spare
    assert sorted(spare[:4]) == sorted(set(range(6)) - set(curriculum.choice(1).drawn))
    assert spare[4] == 7  # at a distance of 0.1
    assert spare[5] == 8


def test_parts_of_a_mixture_keep_their_shares_and_choose_by_their_own_rates():
    pools = [Pool("a", 3.0, list(range(10))), Pool("b", 1.0, list(range(10, 20)))]
    curriculum = make_curriculum(num_items=20, batch_size=4, pools=pools)
    curriculum.rates = torch.tensor([0.5] * 10 + [1.0] * 9 + [0.5], dtype=torch.float64)
    curriculum.last[:] = 0
    for phase in range(1, 5):
        assert sum(item >= 10 for item in drawn(curriculum, phase)) == 1
        assert 19 in drawn(curriculum, phase)


def test_phases_ahead_use_the_rates_of_a_fixed_earlier_phase():
    """Phase 3 with two phases ahead is chosen when phase 1 is taken: with the rates after phase 0, however late it is sampled."""
    early, late = (make_curriculum(num_items=12, num_ahead=2) for _ in range(2))
    for curriculum in (early, late):
        curriculum.plan(0)
        curriculum.observe(0, [group(item, 0.0, 1.0) for item in curriculum.choice(0).drawn], ONE)
        curriculum.plan(1)
    of_third = early.choice(3).drawn
    late.observe(1, [group(item, 1.0, 1.0) for item in late.choice(1).drawn], ONE)
    assert late.choice(3).drawn == of_third
    assert not set(early.choice(1).drawn) & set(early.choice(2).drawn)  # a phase in progress counts as drawn
    with pytest.raises(KeyError):
        early.choice(4)


def test_the_state_holds_the_choices_that_were_made_and_not_yet_trained(tmp_path):
    one, other = (make_curriculum(num_items=12, num_ahead=1, has_spare=True) for _ in range(2))
    one.plan(0)
    one.observe(0, [group(item, 1.0, 1.0) for item in one.choice(0).drawn], ONE)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for phase in (1, 2, 3):
        for curriculum in (one, other):
            curriculum.plan(phase)
        assert one.choice(phase) == other.choice(phase)


@pytest.mark.parametrize(
    "changed", [{"batch_size": 8}, {"has_spare": False}, {"pools": [Pool("", 1.0, list(range(11)))]}]
)
def test_choices_of_other_sizes_or_items_are_made_anew_with_a_warning(caplog, changed):
    sizes = {"num_items": 12, "num_ahead": 1, "has_spare": True}
    one, other = make_curriculum(**sizes), make_curriculum(**{**sizes, **changed})
    one.plan(0)
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(one.state_dict())
    assert "planned do not fit the settings" in caplog.text
    other.plan(0)
    choice = other.choice(1)
    assert len(choice.drawn) == changed.get("batch_size", 4)
    assert bool(choice.spare) == changed.get("has_spare", True)
    assert max([*choice.drawn, *choice.spare]) < (11 if "pools" in changed else 12)


def test_a_state_of_other_items_is_refused_and_a_checkpoint_without_one_is_told(caplog):
    with pytest.raises(
        ConfigError, match=r"success rates of 12 training items, and the environment has 20: .*curriculum: null"
    ):
        make_curriculum(20).load_state_dict(make_curriculum(12).state_dict())
    with caplog.at_level(logging.WARNING):
        make_curriculum().load_state_dict({})
    assert "has no success rates" in caplog.text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"band": (0.8, 0.2)}, r"band must be two rates from 0 to 1, the lower one first, got \[0.8, 0.2\]"),
        ({"band": (-0.1, 0.5)}, r"band must be"),
        ({"band": (float("nan"), 0.5)}, r"band must be"),
        ({"decay": 1.0}, r"decay must be at least 0 and below 1, got 1.0"),
        ({"recheck_phases": 0}, r"recheck_phases must be 1 or more, got 0"),
        ({"success": float("nan")}, r"success must be a finite number or null, got nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        CurriculumConfig(**setting)


class Items(Callback):
    """Keeps the items and the curriculum's metrics of every step."""

    def __init__(self) -> None:
        self.ids, self.items, self.metrics = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        rollouts = [sample.rollout for sample in [*batch.samples, *batch.step.zero_advantage]]
        self.ids.append([rollout.token_ids for rollout in rollouts])
        self.items.append(sorted({rollout.item_index for rollout in rollouts}))
        self.metrics.append({name: value for name, value in batch.step.metrics.items() if "curriculum" in name})


def fit(tiny_model, root, max_steps, ckpt_path=None, curriculum=BAND, loss=None, **sampling):
    torch.manual_seed(0)
    module, seen = make_module(tiny_model, loss), Items()
    sampling = {"group_size": 2, "curriculum": curriculum, **sampling}
    data = make_data(module, TinyEngine(), Judged(12), batch_size=4, steps_per_epoch=12, sampling=sampling)
    settings = {"max_epochs": -1, "max_steps": max_steps, "enable_checkpointing": True}
    sync = AdapterSync(tolerance=100.0)  # with sampling ahead, weights are older
    trainer = make_trainer(root, RunCheckpoint(every_n_steps=1), seen, sync=sync, **settings)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, seen


@pytest.mark.parametrize("loss", [LossConfig(), LossConfig("dapo")], ids=["grpo", "dynamic sampling"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tiny_model, tmp_path, loss):
    config = CurriculumConfig(band=(0.6, 0.9), recheck_phases=2)
    straight, whole = fit(tiny_model, tmp_path / "straight", 7, curriculum=config, loss=loss)
    _, first = fit(tiny_model, tmp_path / "first", 4, curriculum=config, loss=loss)
    saved = tmp_path / "first/checkpoints/last.ckpt"
    resumed, second = fit(tiny_model, tmp_path / "second", 7, saved, config, loss)
    assert first.ids + second.ids == whole.ids
    assert first.metrics + second.metrics == whole.metrics
    assert whole.metrics[-1]["curriculum/below"] + whole.metrics[-1]["curriculum/above"] > 0.0
    pairs = zip(resumed.policy.trainable_parameters(), straight.policy.trainable_parameters(), strict=True)
    assert all(torch.equal(got, expected) for got, expected in pairs)


def test_sampling_ahead_draws_the_same_items_in_every_run_and_after_a_resume(tiny_model, tmp_path):
    """The rollouts after a resume are of newer weights, so only the items of phases that were chosen before are the same."""
    _, whole = fit(tiny_model, tmp_path / "one", 6, max_staleness=1)
    _, again = fit(tiny_model, tmp_path / "two", 6, max_staleness=1)
    assert again.items == whole.items
    fit(tiny_model, tmp_path / "first", 4, max_staleness=1)
    _, second = fit(tiny_model, tmp_path / "second", 5, tmp_path / "first/checkpoints/last.ckpt", max_staleness=1)
    assert second.items == whole.items[4:5]


def test_the_curriculum_changes_what_is_drawn(tiny_model, tmp_path):
    _, with_band = fit(tiny_model, tmp_path / "band", 6, curriculum=CurriculumConfig(band=(0.6, 0.9)))
    _, without = fit(tiny_model, tmp_path / "off", 6, curriculum=None)
    assert with_band.items != without.items
    assert without.metrics == [{}] * 6


def test_a_curriculum_and_repeated_items_are_refused_before_the_engine_starts(tiny_model, tmp_path):
    module, engine = make_module(tiny_model), TinyEngine()
    data = make_data(module, engine, sampling={"curriculum": BAND})
    with pytest.raises(ConfigError, match=r"curriculum chooses items .*overfit_batches repeats"):
        make_trainer(Path(tmp_path), overfit_batches=1).fit(module, datamodule=data)
    assert engine.calls == []
