"""The callbacks of a run, in one table for the command line and for scripts."""

from collections.abc import Collection, Sequence

from lightning.pytorch import Callback

from fuchsia_pl.callbacks.adapter_export import AdapterExport
from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.callbacks.baseline_validation import BaselineValidation
from fuchsia_pl.callbacks.completions_table import CompletionsTable
from fuchsia_pl.callbacks.console import ConsoleReport
from fuchsia_pl.callbacks.evaluation_log import EvaluationLog
from fuchsia_pl.callbacks.finite import FiniteGuard
from fuchsia_pl.callbacks.health import HealthWarnings
from fuchsia_pl.callbacks.hotswap import HotSwap
from fuchsia_pl.callbacks.hyperparameters import HyperparameterLog
from fuchsia_pl.callbacks.last_row import LastRow
from fuchsia_pl.callbacks.live_report import LiveReport
from fuchsia_pl.callbacks.lost_rank import LostRank
from fuchsia_pl.callbacks.memory import MemoryReport
from fuchsia_pl.callbacks.outcome import Outcome
from fuchsia_pl.callbacks.owed_validation import OwedValidation
from fuchsia_pl.callbacks.preflight import Preflight
from fuchsia_pl.callbacks.resume import Resume
from fuchsia_pl.callbacks.rollout_log import RolloutLog
from fuchsia_pl.callbacks.run_checkpoint import RunCheckpoint
from fuchsia_pl.callbacks.run_summary import RunSummary
from fuchsia_pl.callbacks.step_timer import StepTimer
from fuchsia_pl.callbacks.stop_signals import StopSignals
from fuchsia_pl.rollouts.run_checks import Syncer
from fuchsia_pl.types import ConfigError

# Section of a config file and class, in the order in which Lightning calls them (it calls RunCheckpoint last).
DEFAULT_CALLBACKS: dict[str, type[Callback]] = {
    "finite_guard": FiniteGuard,
    "step_timer": StepTimer,
    "memory": MemoryReport,
    "preflight": Preflight,  # before HotSwap: the rehearsal runs while the weights are on the device
    "stop_signals": StopSignals,
    "hotswap": HotSwap,  # before AdapterSync: the engine is awake when it loads weights
    "adapter_sync": AdapterSync,
    "baseline_validation": BaselineValidation,
    "rollout_log": RolloutLog,
    "evaluation_log": EvaluationLog,
    "lost_rank": LostRank,
    "hyperparameter_log": HyperparameterLog,
    "completions_table": CompletionsTable,
    "outcome": Outcome,
    "health": HealthWarnings,
    "console": ConsoleReport,
    "adapter_export": AdapterExport,
    "run_summary": RunSummary,  # after AdapterExport: the adapter is written by then
    "last_row": LastRow,
    "checkpoint": RunCheckpoint,
    "resume": Resume,
    "owed_validation": OwedValidation,
    "report": LiveReport,  # last: it reads the files of the others
}


def default_callbacks(*given: Callback, without: Collection[type[Callback]] = ()) -> list[Callback]:
    """The callbacks of a run of the `fuchsia` command, in the order in which Lightning calls them.

    All files are written to `Trainer.default_root_dir`.

    Args:
        given: A callback of a default class, or of a subclass, replaces that default. All others are placed after FiniteGuard
            and before the other defaults, since a callback that changes weights must be called before AdapterSync.
        without: Classes of defaults that are left out: RunCheckpoint with `Trainer(enable_checkpointing=False)`,
            ConsoleReport with `Trainer(enable_progress_bar=False)`.

    Raises:
        ConfigError: Two of `given` replace the same default.

    >>> callbacks = default_callbacks(AdapterSync(tolerance=0.1), without=[ConsoleReport])
    >>> [type(callback).__name__ for callback in callbacks[:3]], len(callbacks) == len(DEFAULT_CALLBACKS) - 1
    (['FiniteGuard', 'StepTimer', 'MemoryReport'], True)
    """
    defaults: list[Callback] = []
    replaced: list[Callback] = []
    for kind in DEFAULT_CALLBACKS.values():
        matches = [callback for callback in given if isinstance(callback, kind)]
        if len(matches) > 1:
            raise ConfigError(f"{kind.__name__} is given {len(matches)} times, and a run has one: leave the others out")
        replaced += matches
        if matches or kind not in without:
            defaults += matches or [kind()]
    others = [callback for callback in given if callback not in replaced]
    return sorted([*others, *defaults], key=lambda callback: not isinstance(callback, FiniteGuard))


def missing_callbacks(callbacks: Sequence[Callback]) -> list[Callback]:
    """The callbacks that every trainer must have and this one does not have.

    Without AdapterSync the engine keeps its first weights; without RolloutLog no file shows what was trained on.

    Args:
        callbacks: The trainer's callbacks.

    >>> [type(callback).__name__ for callback in missing_callbacks([StepTimer(), AdapterSync()])]
    ['RolloutLog']
    """
    missing: list[Callback] = []
    if not any(isinstance(callback, Syncer) for callback in callbacks):
        missing.append(AdapterSync())
    if not any(isinstance(callback, RolloutLog) for callback in callbacks):
        missing.append(RolloutLog())
    return missing
