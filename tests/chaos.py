"""Kills a run repeatedly at random moments and resumes it each time: `python -m tests.chaos [kills] [seed]`.

The runs are real processes with real files, a real tool server and an engine in a separate process. Each is the `fuchsia`
command, forked here so that everything is imported once. After all kills, weights, rollouts and metrics must equal those of
an undisturbed run, and no process or file may be left.
"""

import contextlib
import csv
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from fuchsia_pl import scratch
from fuchsia_pl.cli.main import main
from fuchsia_pl.envs import MCPServer, ToolEnvironment
from tests.doubles import TinyEnvironment, save_tiny_model
from tests.process_engine import SAMPLER

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)
TARGETS = ("trainer", "trainer", "trainer", "engine", "tool server")
# Exit codes: complete, an orderly end by a signal, a signal before the handlers are installed, or one without a handler.
CODES = (0, 143, 130, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGKILL)
NUM_STEPS = 8
END_S = 60.0  # time limit for the end of a run after a signal; a whole run takes a few seconds
GONE_S = 10.0
TOOL_SERVER = str(Path(__file__).with_name("one_tool.py"))
CONFIG = """
seed_everything: 3
trainer: {{accelerator: cpu, max_epochs: -1, max_steps: {steps}, limit_val_batches: 1.0, accumulate_grad_batches: 2}}
model:
  policy: {{name: {model}, dtype: float32, lora: {{r: 4, alpha: 8, dropout: 0.1}}}}
  loss: {{num_policy_updates: 2}}
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.01}}}}
adapter_sync: {{tolerance: 100.0}}
checkpoint: {{every_n_steps: 2}}
data:
  batch_size: 4
  steps_per_epoch: 4
  sampling: {{group_size: 2, max_completion_tokens: 8, max_length: 1200, engine_restarts: 1000}}
  environment: {{class_path: tests.chaos.Calculator}}
  engine: {{class_path: tests.process_engine.ProcessEngine}}
"""


class Calculator(ToolEnvironment, TinyEnvironment):
    """An environment with a real tool server, which is started, checked before each phase and restarted."""

    def __init__(self) -> None:
        TinyEnvironment.__init__(self)
        self.max_steps = 2
        self.servers = [MCPServer(command=[sys.executable, TOOL_SERVER], max_restarts=1000)]


@dataclass
class Chaos:
    """A run that is killed and resumed.

    Attributes:
        root: Folder of all files.
        numbers: Random choice of the process, the signal and the moment.
        counts: Number of each kind of event.
        longest_s: Seconds of a whole run, the bound of the random moments.
        pids: All processes that it launched.
    """

    root: Path
    numbers: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    pids: set[int] = field(default_factory=set)

    def launch(self, folder: str, checkpoint: Path | None) -> int:
        """Starts the command in a new process; returns its id."""
        words = [
            "fit",
            "--config",
            str(self.root / "chaos.yaml"),
            "--trainer.default_root_dir",
            str(self.root / folder),
        ]
        if checkpoint is not None:
            words += ["--ckpt_path", str(checkpoint)]
        child = os.fork()
        if child:
            self.pids.add(child)
            return child
        code = 1
        try:
            os.setsid()
            log = os.open(self.root / f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = ["fuchsia", *words]
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def newest(self, folder: str) -> Path | None:
        """The checkpoint from which the next run resumes."""
        files = (self.root / folder).glob("chaos/*/checkpoints/last.ckpt")
        return max(files, key=lambda file: int(file.parts[-3]), default=None)

    def disturb(self, process: psutil.Process) -> str:
        """Sends a random signal to a random process of the run; returns its name, or "nothing" if the run has ended."""
        target, number = self.numbers.choice(TARGETS), self.numbers.choice(SIGNALS)
        children = process.children(recursive=True)
        parts = {
            "engine": [child for child in children if SAMPLER in child.cmdline()],
            "tool server": [child for child in children if TOOL_SERVER in child.cmdline()],
        }.get(target, [])
        if not parts:  # it has not started yet, or is not the target
            target, parts = "trainer", [process]
        if parts[0].status() == psutil.STATUS_ZOMBIE:
            return "nothing"
        parts[0].send_signal(number)
        self.counts[f"{number.name} to the {target}"] += 1
        self.counts["kills"] += 1
        return target

    def step(self, folder: str) -> bool:
        """Runs from the newest checkpoint and sends one signal; returns whether the run was completed."""
        process = psutil.Process(self.launch(folder, self.newest(folder)))
        time.sleep(self.numbers.uniform(0.0, self.longest_s))
        mine, target = list[psutil.Process](), "nothing"
        with contextlib.suppress(psutil.NoSuchProcess):  # the process has just ended
            mine = process.children(recursive=True)
            target = self.disturb(process)
        code = self.wait(process.pid, folder)
        self.check_gone(mine, folder)
        self.counts[f"exit code {code}"] += 1
        # Engine and tool server are restarted. Only a tool server that dies during its start ends the run, with one line.
        in_one_line = code in (1, 2) and "error: " in self.log_of(folder) and "Traceback" not in self.log_of(folder)
        is_right = code in CODES if target == "trainer" else code == 0 or (target == "tool server" and in_one_line)
        assert is_right, f"{target}: {code}: {self.log_of(folder)}"
        return code == 0

    def wait(self, pid: int, folder: str) -> int:
        """The exit code of a run, which must end within `END_S`."""
        end = time.monotonic() + END_S
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        raise AssertionError(f"a run did not end: {self.log_of(folder)}")

    def log_of(self, folder: str) -> str:
        """The end of the output of the runs in a folder."""
        return (self.root / f"{folder}.log").read_text()[-3000:]

    def check_gone(self, parts: list[psutil.Process], folder: str) -> None:
        """Checks that no process of an ended run is left after `GONE_S`."""
        _, alive = psutil.wait_procs(parts, GONE_S)
        assert not alive, f"left behind: {alive} {self.log_of(folder)}"

    def run(self, num_kills: int) -> None:
        """Kills `num_kills` times, in as many whole runs as needed, and compares each with an undisturbed run."""
        (self.root / "chaos.yaml").write_text(
            CONFIG.format(model=save_tiny_model(self.root / "model"), steps=NUM_STEPS)
        )
        start = time.monotonic()
        assert self.wait(self.launch("straight", None), "straight") == 0, (self.root / "straight.log").read_text()[
            -3000:
        ]
        self.longest_s = time.monotonic() - start
        wanted, number = result_of(self.root / "straight"), 0
        while self.counts["kills"] < num_kills:
            folder, is_done = f"killed-{number}", False
            while not is_done:
                if self.counts["kills"] >= num_kills:  # the rest without a signal
                    assert self.wait(self.launch(folder, self.newest(folder)), folder) == 0, self.log_of(folder)
                    break
                is_done = self.step(folder)
            compare(result_of(self.root / folder), wanted, folder)
            number += 1
            sys.stderr.write(f"{self.counts['kills']} kills, {number} runs are as the one that was left alone\n")
        self.counts["runs"] = number
        assert not left_behind(self.pids), f"left behind: {left_behind(self.pids)}"


def left_behind(pids: set[int]) -> list[str]:
    """Temporary files and folders that these ended processes have left."""
    places = (scratch.RAM_BACKED, Path(tempfile.gettempdir()))
    names = [found for place in places for file in place.iterdir() if (found := scratch.NAME.match(file.name))]
    return [found.string for found in names if int(found["pid"]) in pids]


@dataclass(frozen=True)
class Result:
    """Results of a run that must be reproduced."""

    weights: dict[str, torch.Tensor]
    rollouts: dict[int, list[str]]  # by step
    metrics: list[dict[str, str]]


def result_of(root: Path) -> Result:
    """Results of the last run in a folder, and rollouts of all runs there: those of later runs replace those of earlier ones."""
    runs = sorted((root / "chaos").iterdir(), key=lambda folder: int(folder.name))
    rollouts: dict[int, list[str]] = {}
    for run in runs:
        of_run: dict[int, list[str]] = {}
        file = run / "rollouts.jsonl"
        for line in file.read_text().splitlines() if file.exists() else []:
            of_run.setdefault(json.loads(line)["step"], []).append(line)
        rollouts |= of_run
    with (runs[-1] / "metrics.csv").open() as stream:
        rows = [
            {name: value for name, value in row.items() if not name.startswith(("perf/", "sync/")) and value}
            for row in csv.DictReader(stream)
        ]
    return Result(load_file(runs[-1] / "adapter/adapter_model.safetensors"), rollouts, rows)


def compare(found: Result, wanted: Result, name: str) -> None:
    """Raises AssertionError if a killed run differs from an undisturbed one."""
    assert found.weights.keys() == wanted.weights.keys()
    for key, tensor in wanted.weights.items():
        assert torch.equal(found.weights[key], tensor), f"{name}: {key}"
    assert found.rollouts == wanted.rollouts, f"{name}: rollouts of the steps {sorted(found.rollouts)}"
    steps = [[row["step"] for row in result.metrics] for result in (found, wanted)]
    assert steps[0] == steps[1], f"{name}: rows of the steps {steps}"
    assert found.metrics == wanted.metrics, f"{name}: metrics"


if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments = [int(word) for word in sys.argv[1:]]
    with tempfile.TemporaryDirectory(prefix="chaos-") as made:
        # The config names the classes by this module's path, not by `__main__`.
        from tests import chaos

        driver = chaos.Chaos(Path(made), random.Random(arguments[1] if len(arguments) > 1 else 0))
        driver.run(arguments[0] if arguments else 100)
        for what, number in sorted(driver.counts.items()):
            sys.stdout.write(f"{number:5d}  {what}\n")
