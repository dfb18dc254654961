"""Items drawn by levels that rise and fall with success, and runs that repeat bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback

from fuchsia_pl.callbacks.run_checkpoint import RunCheckpoint
from fuchsia_pl.envs import Difficulty
from fuchsia_pl.envs.parts import Part
from fuchsia_pl.library.mixture import Mixture
from fuchsia_pl.rollouts.choice import Choice, Chooser, PhaseSizes
from fuchsia_pl.rollouts.config import CurriculumConfig
from fuchsia_pl.rollouts.curriculum import Curriculum
from fuchsia_pl.rollouts.levels import Ladder, LevelCurriculum
from fuchsia_pl.rollouts.ranks import Ranks
from fuchsia_pl.rollouts.shares import Pool
from fuchsia_pl.samples import RolloutGroup
from fuchsia_pl.types import ConfigError, Rollout
from tests.doubles import TinyEngine, TinyEnvironment, make_data, make_module, make_trainer

ONE = Ranks(0, 1, reduce=lambda values, how: values)
BY_LEVEL = CurriculumConfig(by="level", band=(0.3, 0.8), decay=0.5)
# 30 items: sums of the levels 0, 1 and 4, and words without levels
ITEMS = [*(Difficulty("sums", (0, 1, 4)[i % 3]) for i in range(24)), *[None] * 6]


class Judged(TinyEnvironment):
    """A rollout is correct if its first reward is above 0. Items have three levels."""

    def is_correct(self, rollout):
        return rollout.rewards["even"] > 0

    def difficulty(self, item):
        return Difficulty("numbers", item["n"] % 3)


def make_levels(difficulties=ITEMS, batch_size=4, config=BY_LEVEL, pools=None, **sizes) -> LevelCurriculum:
    pools = pools or [Pool("", 1.0, list(range(len(difficulties))))]
    return LevelCurriculum(config, pools, PhaseSizes(3, batch_size, **sizes), difficulties, Judged())


def group(item: int, *rewards: float | None) -> RolloutGroup:
    made = [Rollout({}, item, n, 1.0, "", rewards={"even": r}, reward=r) for n, r in enumerate(rewards)]
    return RolloutGroup(tuple(made), has_spread=len(set(rewards)) > 1)


def played(levels: LevelCurriculum, phase: int, *rewards: float | None) -> Choice:
    """A phase in which every item gets these rewards."""
    levels.plan(phase)
    choice = levels.choice(phase)
    levels.observe(phase, [group(item, *rewards) for item in choice.drawn], ONE)
    return choice


def levels_of(choice: Choice) -> set[int]:
    return {found.level for found in map(ITEMS.__getitem__, choice.drawn) if found is not None}


def test_a_level_rises_above_the_band_and_falls_below_it():
    levels = make_levels()
    rewards = [(1.0, 1.0)] * 6 + [(0.0, 1.0)] * 3 + [(0.0, 0.0)] * 9
    seen = [played(levels, phase, *share) for phase, share in enumerate(rewards)]
    # Three phases with all right: up, twice. Half right after a rate of 0.5: stays. None right: the rate is 0.25 in the first
    # phase, below the band, so down to 1, and after three measured phases each to 0, where it stays.
    assert [choice.metrics["curriculum/level_sums"] for choice in seen] == [0] * 3 + [1] * 3 + [4] * 4 + [1] * 3 + [
        0
    ] * 5
    assert [levels_of(choice) for choice in seen] == [{int(c.metrics["curriculum/level_sums"])} for c in seen]


def test_a_level_is_measured_in_three_phases_and_by_the_decay():
    ladder = Ladder([0, 1, 2], place=1)
    for success in (0.9, 0.9):
        ladder.measure(success, BY_LEVEL)
    assert (ladder.place, ladder.num_phases) == (1, 2)
    ladder.measure(0.1, BY_LEVEL)  # 0.5 x 0.9 + 0.5 x 0.1
    assert (ladder.place, ladder.rate) == (1, pytest.approx(0.5))
    slow = CurriculumConfig(by="level", band=(0.3, 0.8), decay=0.9)
    for success in (1.0, 1.0, 1.0):  # 0.5, 0.55, 0.595, …
        ladder.measure(success, slow)
    assert ladder.rate == pytest.approx(1.0 - 0.5 * 0.9**3)
    ladder.measure(1.0, CurriculumConfig(by="level", band=(0.3, 0.6)))
    assert ladder == Ladder([0, 1, 2], place=2, rate=pytest.approx(float("nan"), nan_ok=True))


def test_kinds_keep_their_shares_whatever_their_levels():
    levels = make_levels(batch_size=5)  # 24 of 30 items are sums
    drawn = [item for phase in range(30) for item in played(levels, phase, 1.0, 1.0).drawn]
    assert sum(item < 24 for item in drawn) == 120
    assert set(drawn) >= set(range(24, 30))  # items without a level are all drawn
    assert set(levels.choice(29).metrics) == {"curriculum/level_sums", "curriculum/filled"}


def test_unscored_rollouts_and_items_of_an_earlier_level_change_nothing():
    levels = make_levels()
    for phase in range(5):
        played(levels, phase, None, None)
    assert levels.ladders["sums"] == Ladder([0, 1, 4], rate=pytest.approx(float("nan"), nan_ok=True))
    levels.observe(5, [group(1, 1.0)], ONE)  # of level 1
    assert levels.ladders["sums"].num_phases == 0


def test_too_few_items_of_a_level_are_filled_with_the_nearest():
    few = [Difficulty("sums", 0), Difficulty("sums", 1), Difficulty("sums", 3), Difficulty("sums", 3)]
    levels = make_levels(few, batch_size=2)
    levels.plan(0)
    assert sorted(levels.choice(0).drawn) == [0, 1]
    assert levels.choice(0).metrics == {"curriculum/level_sums": 0.0, "curriculum/filled": 1.0}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 5)), min_size=8, max_size=40), st.data())
def test_any_history_gives_phases_of_different_items_that_repeat(kinds, data):
    difficulties = [Difficulty(kind, level) for kind, level in kinds]
    share = min(sum(kind == name for kind, _ in kinds) for name in {kind for kind, _ in kinds})
    one, other = (make_levels(difficulties, batch_size=min(4, share), has_spare=True) for _ in range(2))
    for phase in range(12):
        rewards = data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=4))
        choice = played(one, phase, *rewards)
        assert choice == played(other, phase, *rewards)
        assert sorted([*choice.drawn, *choice.spare]) == list(range(len(kinds)))
        of_kind = {kind: {level for other_kind, level in kinds if other_kind == kind} for kind, _ in kinds}
        for kind, levels in of_kind.items():
            assert choice.metrics[f"curriculum/level_{kind}"] in levels
        other.load_state_dict(one.state_dict())


def test_parts_of_a_mixture_have_levels_of_their_own():
    mixture = Mixture({"one": Part(Judged()), "two": Part(TinyEnvironment())})
    found = [mixture.difficulty(item) for item in mixture.train_items()]
    assert set(found) == {None, *(Difficulty("one/numbers", level) for level in range(3))}


def test_a_checkpoint_with_other_levels_is_refused():
    levels = make_levels()
    other = make_levels([found and Difficulty("words", found.level) for found in ITEMS])
    with pytest.raises(ConfigError, match=r"has a curriculum with the levels {'': \[0\], 'words': \[0, 1, 4\]}, and"):
        levels.load_state_dict(other.state_dict())
    levels.load_state_dict({})  # a warning, as with a curriculum by item
    assert levels.ladders["sums"].place == 0


def test_a_checkpoint_by_another_measure_is_refused_and_one_that_is_not_used_is_a_warning(caplog):
    levels = make_levels()
    by_item = Curriculum(CurriculumConfig(), levels.pools, levels.sizes, len(ITEMS), Judged())
    with pytest.raises(ConfigError, match=r"has a curriculum by: item, and data.sampling.curriculum.by is level: use"):
        levels.load_state_dict(by_item.state_dict())
    with pytest.raises(ConfigError, match=r"has a curriculum by: level, and data.sampling.curriculum.by is item: use"):
        by_item.load_state_dict(levels.state_dict())
    chooser = Chooser(levels.pools, levels.sizes)
    chooser.load_state_dict(chooser.state_dict())
    assert not caplog.records
    chooser.load_state_dict(levels.state_dict())
    assert [record.message for record in caplog.records] == [
        "the checkpoint's curriculum is not used: data.sampling.curriculum is null"
    ]


def test_items_without_levels_are_refused_before_the_engine_starts(tiny_model, tmp_path):
    module, engine = make_module(tiny_model), TinyEngine()
    data = make_data(module, engine, sampling={"curriculum": BY_LEVEL})
    with pytest.raises(ConfigError, match="by is level, and no kind of items of TinyEnvironment has several levels"):
        make_trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
    assert engine.calls == []


@pytest.mark.parametrize(
    "wrong",
    [("numbers", 1), Difficulty("numbers", 1.5), Difficulty("numbers", -1), Difficulty(3, 1), Difficulty("", 1), True],
)
def test_a_difficulty_of_another_form_names_the_method(tiny_model, tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(Judged, "difficulty", lambda self, item: wrong)
    module = make_module(tiny_model)
    data = make_data(module, TinyEngine(), Judged(), sampling={"curriculum": BY_LEVEL})
    with pytest.raises(
        ConfigError, match=r"Judged.difficulty returned .* for the item {'n': 0}: it must return a Difficulty"
    ):
        make_trainer(tmp_path, max_steps=1).fit(module, datamodule=data)


def test_a_part_without_items_is_refused():
    pools = [Pool("a", 1.0, list(range(30))), Pool("b", 3.0, [])]
    with pytest.raises(ConfigError, match="the part 'b' of the mixture has 0 training items"):
        make_levels(pools=pools)


def test_a_setting_without_effect_is_refused():
    with pytest.raises(ConfigError, match="recheck_phases is 5, which has no effect with by: level"):
        CurriculumConfig(by="level", recheck_phases=5)


class Seen(Callback):
    """Keeps the rollouts and the levels of every step."""

    def __init__(self) -> None:
        self.ids, self.levels = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        rollouts = [sample.rollout for sample in [*batch.samples, *batch.step.zero_advantage]]
        self.ids.append([rollout.token_ids for rollout in rollouts])
        self.levels.append(batch.step.metrics["curriculum/level_numbers"])


def fit(tiny_model, root, max_steps, ckpt_path=None):
    torch.manual_seed(0)
    module, seen = make_module(tiny_model), Seen()
    config = CurriculumConfig(by="level", band=(0.1, 0.3), decay=0.5)  # about half of the rewards are above 0
    sampling = {"group_size": 2, "curriculum": config}
    data = make_data(module, TinyEngine(), Judged(12), batch_size=4, steps_per_epoch=12, sampling=sampling)
    settings = {"max_epochs": -1, "max_steps": max_steps, "enable_checkpointing": True}
    trainer = make_trainer(root, RunCheckpoint(every_n_steps=1), seen, **settings)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, seen


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tiny_model, tmp_path):
    straight, whole = fit(tiny_model, tmp_path / "straight", 8)
    assert len(set(whole.levels)) > 1
    _, first = fit(tiny_model, tmp_path / "first", 4)
    resumed, second = fit(tiny_model, tmp_path / "second", 8, tmp_path / "first/checkpoints/last.ckpt")
    assert first.ids + second.ids == whole.ids
    assert first.levels + second.levels == whole.levels
    pairs = zip(resumed.policy.trainable_parameters(), straight.policy.trainable_parameters(), strict=True)
    assert all(torch.equal(got, expected) for got, expected in pairs)
