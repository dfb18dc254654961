"""Lightning's own limits: each counts steps or items, or is refused before the engine starts."""

import json
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, GradientAccumulationScheduler, WeightAveraging
from lightning.pytorch.callbacks import StochasticWeightAveraging as SWA

from fuchsia_pl.callbacks.adapter_export import AdapterExport
from fuchsia_pl.callbacks.rollout_log import RolloutLog
from fuchsia_pl.callbacks.run_checkpoint import RunCheckpoint
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.rollouts.flags import Limits
from fuchsia_pl.types import ConfigError
from tests.doubles import TinyEngine, make_data, make_module, make_trainer


class HeldOut(Callback):
    """Keeps the items of each evaluation, before training too."""

    def __init__(self) -> None:
        self.items: list[list[int]] = []

    def on_validation_batch_start(self, trainer, pl_module, batch, *args):
        self.items.append([rollout.item["n"] for rollout in batch.rollouts])

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start


def fit(tiny_model, root, *callbacks, loss=None, engine=None, **trainer_settings):
    module = make_module(tiny_model, loss)
    trainer = make_trainer(root, *callbacks, **trainer_settings)
    trainer.fit(module, datamodule=make_data(module, engine, steps_per_epoch=2))
    return trainer


def drawn_items(root) -> dict[int, list[int]]:
    """The items that each step trained on."""
    lines = [json.loads(line) for line in (root / "rollouts.jsonl").read_text().splitlines()]
    return {
        step: sorted({line["item_index"] for line in lines if line["step"] == step})
        for step in {line["step"] for line in lines}
    }


@pytest.mark.parametrize("overfit", [2, 1.0], ids=["steps", "share"])
def test_overfit_batches_draws_the_same_steps_items_again_and_again(tiny_model, tmp_path, overfit):
    """1.0 is all of an epoch's 2 steps. The rollouts are new, since the seed depends on the step."""
    settings = {"overfit_batches": overfit, "max_epochs": -1, "max_steps": 5, "accumulate_grad_batches": 2}
    fit(tiny_model, tmp_path, RolloutLog(), **settings)
    items = drawn_items(tmp_path)
    assert items[0] == items[2] == items[4]
    assert items[1] == items[3]
    assert not set(items[0]) & set(items[1])
    completions = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    of_first, of_third = ([c["completion_ids"] for c in completions if c["step"] == step] for step in (0, 2))
    assert of_first != of_third


def test_overfit_batches_counts_steps_and_not_phases(tiny_model, tmp_path):
    with pytest.raises(
        ConfigError, match=r"overfit_batches=3 is 3 optimizer steps .* multiple of the 2 optimizer steps of a phase"
    ):
        fit(tiny_model, tmp_path, loss=LossConfig("ppo", num_policy_updates=2), overfit_batches=3)
    with pytest.raises(ConfigError, match=r"overfit_batches=0.1 is 0 optimizer steps"):
        fit(tiny_model, tmp_path, overfit_batches=0.1)


@pytest.mark.parametrize(("num_updates", "num_steps"), [(1, 1), (2, 2)])
def test_fast_dev_run_is_one_phase_of_training_and_one_held_out_item_and_leaves_nothing(
    tiny_model, tmp_path, num_updates, num_steps
):
    """A step has 2 micro-batches here, which Lightning would count as 2 batches."""
    held_out, loss = HeldOut(), LossConfig("ppo", num_policy_updates=num_updates)
    parts = [held_out, AdapterExport(), RunCheckpoint(every_n_steps=1)]
    flags = {"fast_dev_run": True, "accumulate_grad_batches": 2, "enable_checkpointing": True}
    trainer = fit(tiny_model, tmp_path, *parts, loss=loss, **flags)
    assert trainer.global_step == num_steps
    assert held_out.items == [[100]]
    assert not [
        path for path in tmp_path.rglob("*") if path.name in ("adapter", "checkpoints") or path.suffix == ".ckpt"
    ]


@pytest.mark.parametrize(
    ("limit", "expected"), [(1, 1), (3, 3), (50, 4), (1.0, 4), (0.5, 2), (0.3, 1)]
)  # of 4 items; a share is rounded down, as Lightning does
def test_limits_of_held_out_splits_count_items(tiny_model, tmp_path, limit, expected):
    module, engine = make_module(tiny_model), TinyEngine()
    for verb, flag in {"validate": "val", "test": "test", "predict": "predict"}.items():
        held_out = HeldOut()
        trainer = make_trainer(tmp_path, held_out, **{"limit_val_batches": 0, f"limit_{flag}_batches": limit})
        for _ in range(2):  # a trainer's limits outlive a run
            getattr(trainer, verb)(module, datamodule=make_data(module, engine))
        assert held_out.items == 2 * [[100, 101, 102, 103][:expected]]


def test_validation_within_training_takes_the_limited_items_every_n_epochs(tiny_model, tmp_path):
    held_out = HeldOut()
    settings = {"limit_val_batches": 3, "check_val_every_n_epoch": 2, "max_epochs": 5, "num_sanity_val_steps": 2}
    fit(tiny_model, tmp_path, held_out, **settings)
    # the check before training has another number of items; then after the 2nd and the 4th epoch
    assert [len(items) for items in held_out.items] == [2, 3, 3]


class HeldOutSteps(HeldOut):
    """Optimizer steps after which the held-out items were sampled."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *args):
        self.steps.append((trainer.global_step, batch.held_out.step))


@pytest.mark.parametrize(
    ("flags", "num_updates", "expected"),
    [
        ({"val_check_interval": 1}, 1, [1, 2, 3, 4, 5, 6]),
        ({"val_check_interval": 2}, 1, [2, 5]),  # epochs of three steps: the 2nd of each
        ({"val_check_interval": 2, "check_val_every_n_epoch": None}, 1, [2, 4, 6]),
        ({"val_check_interval": 4, "check_val_every_n_epoch": None}, 2, [4]),
        ({"val_check_interval": 2 / 3}, 1, [2, 5]),
        ({"val_check_interval": 2, "check_val_every_n_epoch": 2}, 1, [5]),
        ({"check_val_every_n_epoch": 2}, 1, [6]),
    ],
)
@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_validation_within_epochs_counts_optimizer_steps(
    tiny_model, tmp_path, flags, num_updates, expected, num_micro_batches
):
    held_out = HeldOutSteps()
    settings = {"limit_val_batches": 2, "max_epochs": 6 // 3, "accumulate_grad_batches": num_micro_batches, **flags}
    loss = None if num_updates == 1 else LossConfig("ppo", num_policy_updates=num_updates)
    if num_updates == 2:
        settings |= {"max_epochs": 1, "max_steps": 6}
    trainer = make_trainer(tmp_path, held_out, **settings)
    module = make_module(tiny_model, loss)
    trainer.fit(module, datamodule=make_data(module, steps_per_epoch=3 * num_updates))
    assert held_out.steps == [(step, step) for step in expected]  # with the weights of that step
    assert trainer.val_check_interval == flags.get("val_check_interval", 1.0)  # for the next run of this trainer


def test_a_validation_within_a_phase_is_refused(tiny_model, tmp_path):
    module = make_module(tiny_model, LossConfig("ppo", num_policy_updates=2))
    trainer = make_trainer(tmp_path, limit_val_batches=1.0, val_check_interval=1)
    with pytest.raises(
        ConfigError, match=r"val_check_interval=1 is 1 optimizer steps .*the 2 optimizer steps of a phase"
    ):
        trainer.fit(module, datamodule=make_data(module, steps_per_epoch=4))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"limit_val_batches": 0.2}, r"limit_val_batches=0.2 takes 0 of 4 held-out items for 1 rank"),
        (
            {"limit_val_batches": 1.0, "val_check_interval": 4},
            "val_check_interval=4 is more optimizer steps than an epoch has, data.steps_per_epoch=2: .*check_val_every_n_",
        ),
        (
            {"limit_val_batches": 1.0, "val_check_interval": 0.25},
            "val_check_interval=0.25 is 0.5 optimizer steps .* multiple of the 1 optimizer steps",
        ),
        (
            {"limit_val_batches": 1.0, "val_check_interval": timedelta(seconds=90)},
            "val_check_interval=90 s would validate",
        ),
        (
            {"limit_train_batches": 1, "accumulate_grad_batches": 2},
            "limit_train_batches=1 would cut a phase: it has 2 mi",
        ),
        ({"limit_train_batches": 0.2, "accumulate_grad_batches": 2}, "limit_train_batches=0.2 would cut a phase"),
        (
            {"precision": "64-true"},
            "'64-true': float64 would be given to the frozen weights too, and no engine samples in it",
        ),
        ({"precision": "bf16-true"}, "'bf16-true': the trained weights would not be float32"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_what_has_no_meaning_is_refused_before_the_engine_starts(tiny_model, tmp_path, flags, words):
    engine = TinyEngine()
    with pytest.raises(ConfigError, match=words):
        fit(tiny_model, tmp_path, engine=engine, **flags)
    assert not hasattr(engine, "spec")


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_limit_that_leaves_nothing_to_report_is_refused(tiny_model, tmp_path, verb):
    module, flag = make_module(tiny_model), "val" if verb == "validate" else verb
    trainer = make_trainer(tmp_path, **{f"limit_{flag}_batches": 0})
    with pytest.raises(ConfigError, match=rf"trainer.limit_{flag}_batches=0 leaves nothing to do for `{verb}`"):
        getattr(trainer, verb)(module, datamodule=make_data(module))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (WeightAveraging, "WeightAveraging averages a copy of the whole model.*weight_average.WeightAverage"),
        (EMAWeightAveraging, "EMAWeightAveraging averages a copy of the whole model"),
        (lambda: SWA(1e-3), "StochasticWeightAveraging averages a copy of the whole model"),
        (lambda: GradientAccumulationScheduler({0: 2}), "GradientAccumulationScheduler would cut optimizer steps"),
    ],
)
def test_callbacks_that_would_go_wrong_without_a_word_are_refused(tiny_model, tmp_path, make, words):
    engine = TinyEngine()
    with pytest.raises(ConfigError, match=words):
        fit(tiny_model, tmp_path, make(), engine=engine)
    assert not hasattr(engine, "spec")


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(1, 400), st.integers(1, 4), st.integers(1, 500) | st.floats(0.001, 1.0))
def test_a_limit_takes_the_first_items_as_many_as_it_says(num_items, num_ranks, limit):
    """An int is a number of items, a float a share of them. A limit that leaves a rank without an item is refused."""
    limits = Limits(1, None, limit, "limit_val_batches", limit)
    number = min(limit, num_items) if isinstance(limit, int) else int(limit * num_items)
    positions = list(range(100, 100 + num_items))
    if number < num_ranks:
        with pytest.raises(ConfigError, match=f"takes {number} of {num_items} held-out items for {num_ranks} rank"):
            limits.first_held_out(positions, num_ranks)
    else:
        assert limits.first_held_out(positions, num_ranks) == positions[:number]
