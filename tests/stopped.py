"""Runs that receive a signal at a given point, in processes: `python -m tests.stopped` is `fuchsia` with the doubles below.

The environment variable TEST_SIGNAL has the signal and the point, as JSON.
"""

import json
import os
import signal
import sys
import time

import torch
from lightning.pytorch import Callback

from fuchsia_pl.cli.main import main
from fuchsia_pl.policy import sources
from fuchsia_pl.stopping import SECOND_AFTER_S
from tests.doubles import RecordedEngine, TinyEnvironment


def hit(where: str, step: int = 0) -> None:
    """Sends the configured signal to this process if it is configured for this point."""
    wanted = json.loads(os.environ.get("TEST_SIGNAL", "{}"))
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if wanted.get("where") != where or wanted.get("step", 0) != step or wanted.get("rank", rank) != rank:
        return
    number = signal.Signals[wanted["signal"]]
    os.environ["TEST_SIGNAL"] = json.dumps({"closing": wanted.get("closing", 0)})
    os.kill(os.getpid(), number)
    if wanted.get("twice"):
        time.sleep(2 * SECOND_AFTER_S)
        os.kill(os.getpid(), number)
    time.sleep(wanted.get("lasts", 0))
    if wanted.get("hangs"):
        with torch.no_grad():  # in a call that no handler interrupts
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            signal.sigwait({signal.SIGALRM})


class SignalledEngine(RecordedEngine):
    """A RecordedEngine that sends the configured signal at its start, in a sync or while it samples."""

    def start(self, spec) -> None:
        hit("start")

    def close(self) -> None:
        wanted = json.loads(os.environ["TEST_SIGNAL"])
        if os.environ.get("LOCAL_RANK") == "1" and wanted.get("closing"):
            time.sleep(wanted["closing"])
            os.write(2, b"rank 1 has closed its engine\n")

    async def load_weights(self, path, version: int) -> None:
        hit("sync", version)
        await super().load_weights(path, version)

    async def generate(self, prompt_ids, sampling):
        validates = sampling.temperature == 0
        hit("validation" if validates else "sampling", self._version)
        return await super().generate(prompt_ids, sampling)


class SignalledEnvironment(TinyEnvironment):
    async def prepare(self) -> None:
        hit("preparation")


class SignalAt(Callback):
    """Sends the configured signal within a step, at its optimizer step, at the end of training or in a save."""

    def on_train_batch_end(self, trainer, *args) -> None:
        hit("batch", trainer.fit_loop.epoch_loop.batch_progress.total.ready)

    def on_before_optimizer_step(self, trainer, *args) -> None:
        hit("optimizer", trainer.global_step)

    def on_train_end(self, *args) -> None:
        hit("export")

    def on_save_checkpoint(self, trainer, *args) -> None:
        hit("saving", trainer.global_step)


def leave(rollouts, *args, **kwargs):
    """A reward function that ends the process with exit code 0."""
    os._exit(0)


class Leaving(TinyEnvironment):
    def __init__(self) -> None:
        super().__init__()
        self.reward_functions = [leave]
        self.reward_weights = {}


if __name__ == "__main__":
    sys.argv[0] = "fuchsia"  # the command that is printed for the resume
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background processes without it
    if json.loads(os.environ["TEST_SIGNAL"]).get("where") == "conversion":
        sources._unpack = lambda file, folder, *_: ((folder / "half").touch(), hit("conversion"))
    main()
