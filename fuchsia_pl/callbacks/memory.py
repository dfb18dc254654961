"""Memory of a run: logs it, and returns freed memory to the system."""

import ctypes
import sys
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import psutil
from lightning.pytorch import Callback, LightningModule, Trainer

from fuchsia_pl.batch import Batch
from fuchsia_pl.callbacks.stop_signals import launched_ranks


class MemoryReport(Callback):
    """Returns freed memory to the system after each optimizer step, and logs `perf/memory_gb` once per step.

    Micro-batches of varying lengths fragment glibc's heap: otherwise the resident memory of a CPU run grows by megabytes per
    step for a hundred steps, although the memory in use stays the same.

    Args:
        returns: Whether freed memory is returned.
    """

    def __init__(self, returns: bool = True) -> None:
        self.returns = returns
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the number of the step at which training starts."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Returns freed memory and logs, if this micro-batch completed an optimizer step."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if self.returns:
            return_freed()
        others = [rank.pid for rank in launched_ranks(trainer)]
        pl_module.log("perf/memory_gb", resident_bytes(others) / 2**30)


def return_freed() -> None:
    """Returns the free pages of glibc's heap to the system. Other allocators do this themselves."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def resident_bytes(others: Collection[int] = ()) -> int:
    """Resident memory of this process and its children: engines and tool servers. Shared pages count in each process.

    Args:
        others: Children, such as other ranks, that do not count, with all their descendants.

    >>> resident_bytes() > 2**20
    True
    """
    process, total = psutil.Process(), 0
    children = [child for child in process.children() if child.pid not in others]
    for each in [process, *children]:
        with suppress(psutil.NoSuchProcess):  # the process has just ended
            family = [each] if each == process else [each, *each.children(recursive=True)]
            total += sum(_resident(member) for member in family)
    return total


def _resident(process: psutil.Process) -> int:
    with suppress(psutil.NoSuchProcess):
        return process.memory_info().rss
    return 0
