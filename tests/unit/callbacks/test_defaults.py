"""The table of default callbacks, and the callbacks that the module adds to a trainer."""

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor

from fuchsia_pl import AdapterSync, default_callbacks
from fuchsia_pl.callbacks.console import ConsoleReport
from fuchsia_pl.callbacks.defaults import DEFAULT_CALLBACKS, missing_callbacks
from fuchsia_pl.callbacks.finite import FiniteGuard
from fuchsia_pl.callbacks.rollout_log import RolloutLog
from fuchsia_pl.callbacks.run_checkpoint import RunCheckpoint
from fuchsia_pl.callbacks.weight_average import WeightAverage
from fuchsia_pl.types import ConfigError

IN_ORDER = [
    "FiniteGuard",
    "StepTimer",
    "MemoryReport",
    "Preflight",
    "StopSignals",
    "HotSwap",
    "AdapterSync",
    "BaselineValidation",
    "RolloutLog",
    "EvaluationLog",
    "LostRank",
    "HyperparameterLog",
    "CompletionsTable",
    "Outcome",
    "HealthWarnings",
    "ConsoleReport",
    "AdapterExport",
    "RunSummary",
    "LastRow",
    "RunCheckpoint",
    "Resume",
    "OwedValidation",
    "LiveReport",
]


class LaterSync(AdapterSync): ...


def names(callbacks: list[Callback]) -> list[str]:
    return [type(callback).__name__ for callback in callbacks]


def test_the_default_callbacks_are_in_the_order_of_the_command():
    assert names(default_callbacks()) == IN_ORDER
    assert [kind.__name__ for kind in DEFAULT_CALLBACKS.values()] == IN_ORDER


def test_a_given_callback_replaces_the_default_of_its_class_or_base_class():
    sync, checkpoint = LaterSync(tolerance=0.5), RunCheckpoint(every_n_steps=7)
    callbacks = default_callbacks(checkpoint, sync)
    assert callbacks[IN_ORDER.index("AdapterSync")] is sync
    assert callbacks[IN_ORDER.index("RunCheckpoint")] is checkpoint
    assert len(callbacks) == len(IN_ORDER)


def test_other_callbacks_come_after_the_guard_and_before_the_sync():
    average = WeightAverage(0.9)
    assert names(default_callbacks(average)) == ["FiniteGuard", "WeightAverage", *IN_ORDER[1:]]


def test_a_default_is_left_out_only_where_it_was_not_given():
    assert names(default_callbacks(without=[RunCheckpoint, ConsoleReport])) == [
        name for name in IN_ORDER if name not in ("RunCheckpoint", "ConsoleReport")
    ]
    given = RunCheckpoint()
    assert given in default_callbacks(given, without=[RunCheckpoint])


def test_two_callbacks_for_one_default_are_refused():
    with pytest.raises(ConfigError, match=r"^AdapterSync is given 2 times, and a run has one: leave the others out$"):
        default_callbacks(AdapterSync(), LaterSync())


def test_only_missing_callbacks_are_added():
    assert names(missing_callbacks([FiniteGuard(), LearningRateMonitor()])) == ["AdapterSync", "RolloutLog"]
    assert names(missing_callbacks([LaterSync()])) == ["RolloutLog"]
    assert names(missing_callbacks([RolloutLog()])) == ["AdapterSync"]
    assert missing_callbacks(default_callbacks()) == []


def test_a_callback_with_a_sync_of_its_own_is_the_sync():
    class OwnSync(Callback):
        def sync(self, trainer: Trainer, pl_module) -> float | None: ...

    assert names(missing_callbacks([OwnSync()])) == ["RolloutLog"]
