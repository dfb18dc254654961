"""Warnings in words when something is wrong with a training run."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fuchsia_pl.batch import Batch
from fuchsia_pl.callbacks.access import data_of, is_trial, module_of
from fuchsia_pl.envs.base import weights_at
from fuchsia_pl.envs.bounded import call_apart
from fuchsia_pl.evaluation.health import NAMES, Finding, find_illnesses, learning_rate
from fuchsia_pl.evaluation.history import EQUAL_GROUPS, History, reward_spreads, step_row
from fuchsia_pl.files import append_lines, replacing
from fuchsia_pl.objectives.credit import GROUP_ADVANTAGES
from fuchsia_pl.rollouts.credit import OVERLONG, named_rewards
from fuchsia_pl.types import ConfigError

WARNINGS_FILE = "warnings.jsonl"

logger = logging.getLogger(__name__)


class HealthWarnings(Callback):
    """Watches the metrics of a run, and warns in words, with the metric that shows it and what to try.

    Each warning is printed once, and again when it is twice as bad. `warnings.jsonl` in the run folder has all of them; a
    resumed run continues it. The rules are in `evaluation/health.py`.

    Args:
        enabled: False turns all warnings of this section off.
        window: Optimizer steps of a window. Metrics are compared as medians over windows; shorter windows warn earlier and
            more often without need.
        flat_steps: Optimizer steps after which a reward that has not risen is reported; at least two windows.
        ignore: Names of warnings that are not wanted, such as `[reward_flat]`.

    Raises:
        ConfigError: A window is shorter than 2 steps, `flat_steps` than two windows, or a name is unknown.
    """

    def __init__(
        self, enabled: bool = True, window: int = 10, flat_steps: int = 100, ignore: list[str] | None = None
    ) -> None:
        if window < 2:
            raise ConfigError(f"health.window must be 2 or more, got {window}: one step is no trend")
        if flat_steps < 2 * window:
            raise ConfigError(f"health.flat_steps must be at least two windows ({2 * window}), got {flat_steps}")
        unknown = sorted(set(ignore or ()) - set(NAMES))
        if unknown:
            raise ConfigError(f"health.ignore has {', '.join(unknown)}, and the warnings are {', '.join(NAMES)}")
        self.enabled = enabled
        self.ignore = frozenset(ignore or ())
        self._history = History(window, flat_steps)
        self._levels: dict[str, float] = {}  # by name, when it was last told
        self._told: list[dict[str, Any]] = []
        self._last_step = 0
        self._rewards: dict[int, list[Mapping[str, float | None]]] = {}  # of this rank's rollouts, by item

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the file, with the warnings of a resumed run, and checks the learning rate."""
        if trainer.global_step == 0:
            self._history = History(self._history.window, self._history.flat_steps)
            self._levels, self._told = {}, []
        self._last_step, self._rewards = trainer.global_step, {}
        if not self.enabled:
            return
        self._restart_file(trainer)
        found = _rate_finding(trainer) if module_of(trainer).policy_config.lora.enabled else None
        if found is not None:
            self._tell(trainer, found)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Collects the rewards of the step's rollouts."""
        is_first = batch_idx % trainer.accumulate_grad_batches == 0
        for sample in [*batch.samples, *(batch.step.zero_advantage if is_first else ())]:
            if sample.is_first:
                self._rewards.setdefault(sample.rollout.item_index, []).append(named_rewards(sample.rollout))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Looks for illnesses if this micro-batch completed an optimizer step."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        rewards, self._rewards = self._rewards, {}
        if not self.enabled:
            return
        data, loss = data_of(trainer), module_of(trainer).loss_config
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row = step_row(metrics, data.batch_size, data.rows_per_phase)
        if loss.parts.advantage not in GROUP_ADVANTAGES:
            row.pop(EQUAL_GROUPS, None)  # equal siblings have advantages all the same
        elif loss.parts.reward_aggregation == "sum_then_normalize":
            first_step = batch.step.step - batch.step.phase_step  # whose weights the whole phase has
            weights = {OVERLONG: 1.0, **call_apart(weights_at, data.environment, first_step)}
            row |= reward_spreads(rewards.values(), lambda name: weights[name])
        self._history.add(row)
        for finding in find_illnesses(self._history):
            self._tell(trainer, finding)

    def state_dict(self) -> dict[str, Any]:
        """The history and what was told, for a resumed run."""
        return {"history": self._history.state_dict(), "levels": dict(self._levels), "told": list(self._told)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the history of the resumed run."""
        self._history.load_state_dict(state_dict["history"])
        self._levels, self._told = dict(state_dict["levels"]), list(state_dict["told"])

    def _tell(self, trainer: Trainer, finding: Finding) -> None:
        if finding.name in self.ignore:
            return
        if finding.name in self._levels and not finding.is_worse_than(self._levels[finding.name]):
            return
        self._levels[finding.name] = finding.level
        line = {
            "step": trainer.global_step,
            "name": finding.name,
            "metric": finding.metric,
            "text": finding.text,
            "advice": finding.advice,
        }
        self._told.append(line)
        if not trainer.is_global_zero:
            return
        logger.warning("step %d: %s. %s", trainer.global_step, finding.text, finding.advice)
        if not is_trial(trainer):
            append_lines(_file(trainer), json.dumps(line) + "\n")

    def _restart_file(self, trainer: Trainer) -> None:
        file = _file(trainer)
        if trainer.is_global_zero and not is_trial(trainer) and (self._told or file.exists()):
            with replacing(file) as partial:
                partial.write_text("".join(json.dumps(line) + "\n" for line in self._told))


def _file(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / WARNINGS_FILE


def _rate_finding(trainer: Trainer) -> Finding | None:
    """The finding about the highest initial rate. The current one may be 0, in a warm-up."""
    rates = {
        float(rate): type(optimizer).__name__
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        if (rate := group.get("initial_lr", group["lr"])) is not None  # None if it computes its own, as Adafactor may
    }
    highest = max(rates, default=math.nan)
    return learning_rate(highest, rates[highest]) if rates else None
