"""The summary of a run in Weights & Biases: best and last held-out figures, and the adapter."""

import re
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from fuchsia_pl.callbacks.access import is_trial
from fuchsia_pl.callbacks.adapter_export import ADAPTER_FOLDER

# Held-out metrics of which a higher value is better.
RISING = re.compile(r"validation/(reward/.+|rollout/accuracy|(pass|maj|mean)@\d+)")


class RunSummary(Callback):
    """Writes the best and the last held-out figures to the summary of a Weights & Biases run, and its adapter as an artifact.

    The summary has `last/<metric>` of all held-out metrics, `best/<metric>` of rewards, accuracy, pass@k and maj@k, and with it
    `best_step/<metric>`, the number of optimizer steps before that evaluation. A resumed run continues it.

    Args:
        adapter_artifact: Uploads `adapter/` of the run folder at the end of training, as an artifact of type `model`. Offline it
            is copied into the run's files.
    """

    def __init__(self, adapter_artifact: bool = False) -> None:
        self.adapter_artifact = adapter_artifact
        self._best: dict[str, float] = {}
        self._best_steps: dict[str, int] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the figures of a resumed run, or of the validation before training."""
        self._write(trainer, {})

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds the figures before training, if all items were measured."""
        if trainer.num_sanity_val_steps == float("inf"):
            self._add(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds the figures of an evaluation."""
        if not trainer.sanity_checking:
            self._add(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the adapter, which AdapterExport has written before."""
        if not self.adapter_artifact or is_trial(trainer) or not trainer.is_global_zero:
            return
        import wandb  # optional, and slow to import

        for logger in _runs(trainer):
            metadata = {"optimizer_steps": trainer.global_step, **self._figures("best", self._best)}
            artifact = wandb.Artifact(f"adapter-{logger.experiment.id}", type="model", metadata=metadata)
            artifact.add_dir(str(Path(trainer.default_root_dir) / ADAPTER_FOLDER))
            logger.experiment.log_artifact(artifact)

    def state_dict(self) -> dict[str, Any]:
        """The best figures, for a resumed run."""
        return {"best": dict(self._best), "best_steps": dict(self._best_steps)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with the best figures of the resumed run."""
        self._best, self._best_steps = dict(state_dict["best"]), dict(state_dict["best_steps"])

    def _add(self, trainer: Trainer) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        last = {name: value for name, value in metrics.items() if name.startswith("validation/")}
        for name, value in last.items():
            if RISING.fullmatch(name) and value > self._best.get(name, -float("inf")):
                self._best[name], self._best_steps[name] = value, trainer.global_step
        self._write(trainer, last)

    def _write(self, trainer: Trainer, last: dict[str, float]) -> None:
        found = {
            **self._figures("last", last),
            **self._figures("best", self._best),
            **self._figures("best_step", self._best_steps),
        }
        if found and trainer.is_global_zero:
            for logger in _runs(trainer):
                logger.experiment.summary.update(found)

    @staticmethod
    def _figures(kind: str, values: dict[str, Any]) -> dict[str, Any]:
        return {f"{kind}/{name}": value for name, value in values.items()}


def _runs(trainer: Trainer) -> list[WandbLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
