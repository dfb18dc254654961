"""Runs that get a signal in the middle of something: real processes, which are forked here to import everything only once.

python -m tests.stopped: reads runs from standard input, one a line as JSON, and writes their exit codes.
"""

import json
import os
import signal
import sys
import time

import torch
from lightning.pytorch import Callback

from fuchsia_pl import scratch
from fuchsia_pl.cli.main import main
from fuchsia_pl.policy import sources
from fuchsia_pl.stopping import SECOND_AFTER_S
from tests.doubles import RecordedEngine, TinyEnvironment


def hit(where: str, step: int = 0) -> None:
    """Sends this process the signal that the run is to get here, if it is."""
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
        with torch.no_grad():  # deep in a call that no handler interrupts
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            signal.sigwait({signal.SIGALRM})


class SignalledEngine(RecordedEngine):
    """Samples the recorded; slowly, where a signal is to come in the middle of it."""

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
    """Within a step, at its optimizer step, and at the end of training."""

    def on_train_batch_end(self, trainer, *args) -> None:
        hit("batch", trainer.fit_loop.epoch_loop.batch_progress.total.ready)

    def on_before_optimizer_step(self, trainer, *args) -> None:
        hit("optimizer", trainer.global_step)

    def on_train_end(self, *args) -> None:
        hit("export")

    def on_save_checkpoint(self, trainer, *args) -> None:
        hit("saving", trainer.global_step)


def leave(rollouts, *args, **kwargs):
    """A reward that ends the process as if all were well."""
    os._exit(0)


class Leaving(TinyEnvironment):
    def __init__(self) -> None:
        super().__init__()
        self.reward_functions = [leave]
        self.reward_weights = {}


def run(words: list[str], wanted: dict[str, object], output: str) -> None:
    """The process of one run."""
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ["TEST_SIGNAL"] = json.dumps(wanted)
    if wanted.get("where") == "conversion":
        sources._unpack = lambda file, folder: ((folder / "half").touch(), hit("conversion"))
    sys.argv = ["fuchsia", *words]
    main()


def serve() -> None:
    """Forks a process for each line, and writes how it ended."""
    torch.set_num_threads(1)
    assert scratch.started_at(os.getpid())
    for line in sys.stdin:
        words, wanted, output = json.loads(line)
        start = time.perf_counter()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run(words, wanted, output)
                code = 0
            except SystemExit as end:
                code = end.code
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)} {time.perf_counter() - start:.1f}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    if len(sys.argv) == 1:
        serve()
    else:  # a rank that a launcher started
        main()
