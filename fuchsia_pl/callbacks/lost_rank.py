"""Says what it means when ranks lose each other."""

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fuchsia_pl.callbacks.run_checkpoint import LAST


class LostRank(Callback):
    """Adds to an error of an exchange between ranks what happened and how to go on: the backends name sockets and functions."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called on each rank that is still there."""
        if trainer.world_size == 1 or not is_lost_exchange(exception):
            return
        checkpoint = Path(trainer.default_root_dir) / "checkpoints" / f"{LAST}.ckpt"
        saved = f"go on with --ckpt_path {checkpoint}" if checkpoint.exists() else "no checkpoint was saved yet"
        exception.add_note(
            f"Rank {trainer.global_rank} of {trainer.world_size} lost another: it ended (its own output says why), the "
            f"network between them was cut, or it took longer than the limit of trainer.strategy. After mending that, {saved}"
        )


def is_lost_exchange(exception: BaseException) -> bool:
    """Whether an exchange between ranks failed; gloo says so in a plain RuntimeError."""
    return isinstance(exception, torch.distributed.DistError) or (
        isinstance(exception, RuntimeError) and "gloo" in str(exception)
    )
