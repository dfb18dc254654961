"""Learning rates: by transformers' names and by a monitored metric, and settings that are refused before an engine starts."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn

from fuchsia_pl.policy.schedules import NAMES, TransformersSchedule
from fuchsia_pl.types import ConfigError
from tests.doubles import TinyEngine, make_data, make_module, make_trainer


def optimizer(lr: float = 2.0) -> torch.optim.Optimizer:
    return torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=lr)


def rates(schedule, num_steps: int) -> list[float]:
    found = []
    for _ in range(num_steps):
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return found


def test_warm_up_and_cosine_by_hand():
    """Up from 0 in steps of lr / 4, then lr / 2 (1 + cos(pi p)) with p the share of the 8 steps that follow."""
    found = rates(TransformersSchedule(optimizer(2.0), "cosine", num_warmup_steps=4, num_training_steps=12), 12)
    expected = [0.0, 0.5, 1.0, 1.5] + [1.0 + math.cos(math.pi * step / 8) for step in range(8)]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_of_steps_can_be_named(name):
    options = {"cosine_with_min_lr": {"min_lr_rate": 0.1}, "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1}}
    options |= {"warmup_stable_decay": {"num_decay_steps": 2}}
    made = TransformersSchedule(optimizer(), name, num_warmup_steps=1, num_training_steps=6, options=options.get(name))
    found = rates(made, 6)
    assert max(found) == pytest.approx(2.0)
    saved = made.state_dict()
    again = TransformersSchedule(optimizer(), name, num_warmup_steps=1, num_training_steps=6, options=options.get(name))
    again.load_state_dict(saved)
    assert again.get_last_lr() == made.get_last_lr()


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("cosin", {}, "name='cosin', which does not depend on steps alone: use one of linear, cosine"),
        (
            "reduce_lr_on_plateau",
            {},
            "use lightning.pytorch.cli.ReduceLROnPlateau, which takes the metric as its monitor",
        ),
        ("cosine", {}, "requires `num_training_steps`"),
        ("linear", {"num_training_steps": 3, "options": {"cycles": 2}}, "unexpected keyword argument 'cycles'"),
    ],
)
def test_a_schedule_that_cannot_be_made_is_refused(name, settings, words):
    with pytest.raises(ConfigError, match=words):
        TransformersSchedule(optimizer(), name, **settings)


class Rates(Callback):
    """Keeps the learning rate of each optimizer step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


def fit(tiny_model, root, schedule, engine=None, **settings):
    module, seen = make_module(tiny_model, optimizer=partial(torch.optim.SGD, lr=1.0e-3)), Rates()
    module.lr_scheduler = schedule
    trainer = make_trainer(root, seen, **{"max_epochs": -1, "max_steps": 4, "log_every_n_steps": 1, **settings})
    trainer.fit(module, datamodule=make_data(module, engine, steps_per_epoch=2))
    return seen.rates


def test_a_named_schedule_steps_once_per_optimizer_step(tiny_model, tmp_path):
    schedule = partial(TransformersSchedule, name="linear", num_warmup_steps=2, num_training_steps=4)
    found = fit(tiny_model, tmp_path, schedule, accumulate_grad_batches=5)
    assert found == pytest.approx([0.0, 0.5e-3, 1.0e-3, 0.5e-3])


@pytest.mark.parametrize(
    ("monitor", "expected"),
    [
        (
            "reward/mean",
            [1.0e-3, 1.0e-3, 1.0e-4, 1.0e-5],
        ),  # the 1st value is the best by definition; then one step too late
        ("validation/reward/mean", [1.0e-3, 1.0e-3, 1.0e-3, 1.0e-3, 1.0e-4, 1.0e-4]),  # after the 2nd epoch of 2 steps
    ],
)
def test_a_plateau_is_watched_by_its_monitor(tiny_model, tmp_path, monitor, expected):
    """No value is better than the best one by 100. With patience 0, each such value divides the rate by 10."""
    schedule = partial(
        ReduceLROnPlateau, monitor=monitor, mode="max", patience=0, threshold=100.0, threshold_mode="abs"
    )
    found = fit(tiny_model, tmp_path, schedule, max_steps=len(expected), limit_val_batches=1.0)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (
            torch.optim.lr_scheduler.ReduceLROnPlateau,
            "has no `monitor`: use lightning.pytorch.cli.ReduceLROnPlateau with",
        ),
        (
            partial(ReduceLROnPlateau, monitor="validation/reward/mean"),
            "monitors validation/reward/mean, but .*is 0: monitor",
        ),
        (partial(TransformersSchedule, name="cosine"), "requires `num_training_steps`"),
        (partial(torch.optim.lr_scheduler.StepLR), "model.lr_scheduler cannot be made from its settings: .*step_size"),
    ],
)
def test_a_wrong_schedule_is_refused_before_the_engine_starts(tiny_model, tmp_path, schedule, words):
    engine = TinyEngine()
    with pytest.raises(ConfigError, match=words):
        fit(tiny_model, tmp_path, schedule, engine)
    assert not hasattr(engine, "spec")


def test_a_wrong_optimizer_is_refused_before_the_engine_starts(tiny_model, tmp_path):
    module, engine = make_module(tiny_model, optimizer=partial(torch.optim.AdamW, lr=-1.0)), TinyEngine()
    with pytest.raises(
        ConfigError, match=r"model.optimizer cannot be made from its settings: Invalid learning rate: -1.0"
    ):
        make_trainer(tmp_path).fit(module, datamodule=make_data(module, engine))
    assert not hasattr(engine, "spec")
