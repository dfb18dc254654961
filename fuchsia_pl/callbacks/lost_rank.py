"""Explanation of errors that a lost rank causes."""

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fuchsia_pl.callbacks.run_checkpoint import LAST


class LostRank(Callback):
    """Adds cause and remedy to a failed exchange between ranks: the backends name only sockets and functions."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Adds the note, on each rank that still runs."""
        if trainer.world_size == 1 or not is_lost_exchange(exception):
            return
        checkpoint = Path(trainer.default_root_dir) / "checkpoints" / f"{LAST}.ckpt"
        saved = (
            f"continue with --ckpt_path {checkpoint}"
            if checkpoint.exists()
            else "start again: no checkpoint was saved yet"
        )
        exception.add_note(
            f"Rank {trainer.global_rank} of {trainer.world_size} lost another: that rank ended (see its output), the "
            f"network between them failed, or it exceeded the time limit of trainer.strategy. After fixing that, {saved}"
        )


def is_lost_exchange(exception: BaseException) -> bool:
    """Whether an exchange between ranks failed. Gloo raises a plain RuntimeError."""
    return isinstance(exception, torch.distributed.DistError) or (
        isinstance(exception, RuntimeError) and "gloo" in str(exception)
    )
