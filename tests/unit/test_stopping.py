"""Runs that receive a signal to end, in every phase, in real processes; `tests/stopped.py` contains the runs."""

import json
import re
import shlex
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fuchsia_pl.callbacks.stop_signals import StopSignals
from fuchsia_pl.cli.ending import leave_stopped
from fuchsia_pl.policy.checkpoint_files import read_checkpoint
from fuchsia_pl.stopping import CLOSING_S, Stopped, stopping
from fuchsia_pl.types import ConfigError
from tests.forked import Forkserver

CONFIG = """
seed_everything: 3
trainer:
  accelerator: cpu
  max_epochs: -1
  max_steps: 3
  limit_val_batches: 1.0
  accumulate_grad_batches: 2
  callbacks: [{class_path: tests.stopped.SignalAt}]
model:
  policy: {name: %s, dtype: float32, lora: {r: 4, alpha: 8}}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
  lr_scheduler: {class_path: torch.optim.lr_scheduler.LinearLR, init_args: {total_iters: 3}}
adapter_sync: {tolerance: 100.0}
checkpoint: {every_n_steps: 10}
data:
  batch_size: 4
  steps_per_epoch: 2
  sampling: {group_size: 2, max_completion_tokens: 4, max_length: 40}
  environment: {class_path: tests.stopped.SignalledEnvironment}
  engine: {class_path: tests.stopped.SignalledEngine}
"""
# Point of the signal; its name; further options; the exit code; the step of the checkpoint, None without one.
SCENES = {
    "conversion": ("conversion", 0, "SIGTERM", {}, 143, None),
    "preparation": ("preparation", 0, "SIGINT", {}, 130, None),
    "start": ("start", 0, "SIGTERM", {}, 143, None),
    "sampling": ("sampling", 1, "SIGTERM", {}, 143, 1),
    "training": ("batch", 3, "SIGINT", {}, 130, 2),
    "validation": ("validation", 2, "SIGTERM", {}, 143, 2),
    "sync": ("sync", 2, "SIGUSR1", {}, 143, 2),
    "a save that takes longer than a step may": ("saving", 1, "SIGTERM", {"lasts": 2}, 143, 1),
    "export": ("export", 0, "SIGTERM", {}, 143, 3),
    "a second signal": ("optimizer", 1, "SIGTERM", {"twice": 1}, 143, None),
    "a step that hangs": ("optimizer", 1, "SIGTERM", {"hangs": 1}, 143, None),
    "the second of two ranks": ("sampling", 1, "SIGTERM", {"rank": 1, "closing": 2}, 143, 1),
    "the second of two ranks, before training": ("preparation", 0, "SIGINT", {"rank": 1}, 143, None),
}
RESUMED = ("training", "validation")
TIMEOUT_S = 300.0


class Runs:
    """The results of all scenes, and of an undisturbed run."""

    def __init__(self, forkserver: Forkserver, folder: Path, model: Path) -> None:
        self.folder = folder
        self.codes: dict[str, int] = {}
        self._forkserver, self._printed = forkserver, dict[str, str]()
        (folder / "k.yaml").write_text(CONFIG % model)
        (folder / "model.gguf").write_bytes(b"none")

    def run(self, name: str, wanted: dict[str, object], *words: str) -> None:
        command = ["fit", "--config", str(self.folder / "k.yaml"), "--trainer.default_root_dir", name, *words]
        variables = {"TEST_SIGNAL": json.dumps(wanted), "FUCHSIA_CACHE": str(self.folder / "cache")}
        process = self._forkserver.start("-m", "tests.stopped", *command, cwd=self.folder, **variables)
        self.codes[name], self._printed[name] = process.wait(TIMEOUT_S), process.printed

    def said(self, name: str) -> str:
        return self._printed[name]

    def checkpoint(self, name: str) -> Path:
        return self.folder / name / "k/0/checkpoints/last.ckpt"

    def adapter(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "k/0/adapter/adapter_model.safetensors")

    def rollouts(self, name: str) -> list[dict[str, object]]:
        return [json.loads(line) for line in (self.folder / name / "k/0/rollouts.jsonl").open()]


@pytest.fixture(scope="module")
def runs(forkserver, tiny_model, tmp_path_factory):
    made = Runs(forkserver, tmp_path_factory.mktemp("stopped"), tiny_model)
    made.run("straight", {})
    for name, (where, step, number, more, _, _) in SCENES.items():
        words = {
            "conversion": ["--model.policy.name", str(made.folder / "model.gguf")],
            "sync": ["--stop_signals.usr1", "true"],
            "a step that hangs": ["--stop_signals.grace_s", "0.5"],
            "a save that takes longer than a step may": [
                *("--checkpoint.every_n_steps", "1", "--stop_signals.grace_s", "0.5")
            ],
        }.get(name, ["--trainer.devices", "2"] if "of two ranks" in name else [])
        made.run(name, {"where": where, "step": step, "signal": number, **more}, *words)
    for name in RESUMED:
        made.run(f"{name}, resumed", {}, "--ckpt_path", str(made.checkpoint(name)))
    made.run("leaving", {}, "--data.environment", "tests.stopped.Leaving")
    return made


@pytest.mark.parametrize("name", list(SCENES))
def test_a_signal_ends_a_run_with_its_code_and_what_was_trained_is_saved(runs, name):
    *_, code, step = SCENES[name]
    assert runs.codes[name] == code, runs.said(name)
    said, checkpoint = runs.said(name), runs.checkpoint(name)
    assert "Traceback" not in said
    assert checkpoint.exists() == (step is not None)
    if "closing" in SCENES[name][3]:
        assert "rank 1 has closed its engine" in said
    if step is not None:
        assert read_checkpoint(checkpoint)["global_step"] == step
        assert runs.adapter(name)
    if name in ("a second signal", "a step that hangs"):
        assert ("a second signal: the process ends at once" if "second" in name else "did not end in time") in said
    elif name == "export":
        assert "which is complete" in said
    elif step is None:
        assert (
            f"stopped by {'SIGTERM' if code == 143 else 'SIGINT'} before there was a checkpoint to continue from"
            in said
        )
    else:
        assert f"last.ckpt contains the run after step {step}" in said
        words = shlex.split(re.search(r"continue with: (.*)", said)[1])
        assert words[:3] == ["fuchsia", "fit", "--config"]
        assert words[-2] == "--ckpt_path"
        assert runs.folder / words[-1] == checkpoint


def test_a_conversion_leaves_nothing_half_done(runs):
    assert list((runs.folder / "cache").iterdir()) == []


@pytest.mark.parametrize("name", RESUMED)
def test_the_run_goes_on_from_there_bit_for_bit(runs, name):
    assert runs.codes["straight"] == runs.codes[f"{name}, resumed"] == 0
    straight, resumed = runs.adapter("straight"), runs.adapter(f"{name}, resumed")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    assert runs.rollouts("straight") == [*runs.rollouts(name), *runs.rollouts(f"{name}, resumed")]


def test_a_run_that_did_not_end_by_itself_is_no_success(runs):
    assert runs.codes["leaving"] == 1
    assert "os._exit(0)" in runs.said("leaving")


@pytest.fixture
def trainer():
    """A trainer with one rank, as far as the callback uses it. A test of another file may have left handlers installed."""
    stopping.restore()
    return SimpleNamespace(
        is_global_zero=True, strategy=SimpleNamespace(launcher=None), state=SimpleNamespace(fn=None), callbacks=[]
    )


@pytest.mark.parametrize("asked", [None, signal.SIGTERM])
def test_signals_are_given_back_and_forgotten_where_no_command_had_them(trainer, asked):
    """A notebook continues after a fit that failed or was stopped."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    callback = StopSignals(usr1=True)
    callback.check_run(trainer)
    assert signal.getsignal(signal.SIGINT) != before[0]
    if asked:
        with pytest.raises(Stopped):
            signal.raise_signal(asked)
    callback.on_exception(trainer, None, Stopped(asked) if asked else LookupError())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
    kept = ("_console", "_wake", "_wakeup_before", "_pid", "_lock")
    assert {k: v for k, v in vars(stopping).items() if k not in kept} == {
        k: v for k, v in vars(type(stopping)()).items() if k not in kept
    }
    callback.check_run(trainer)  # the next one has a fresh state
    with pytest.raises(Stopped):
        signal.raise_signal(signal.SIGTERM)
    callback.on_exception(trainer, None, Stopped(signal.SIGTERM))


def test_saving_has_its_own_time(trainer):
    """A step in progress has `grace_s`; a save during training, and everything after it, has more."""
    callback = StopSignals(grace_s=7.0)
    callback.check_run(trainer)
    try:
        assert stopping.grace_s == 7.0
        with stopping.saving():
            assert stopping.grace_s == CLOSING_S
        assert stopping.grace_s == 7.0
        callback.on_train_end(trainer, None)
        assert stopping.grace_s == CLOSING_S
        with stopping.saving():
            pass
        assert stopping.grace_s == CLOSING_S
    finally:
        callback.teardown(trainer, None, "fit")


@pytest.mark.parametrize(
    ("end", "printed"),
    [(Stopped(15), []), (None, []), (OSError("no space"), ["error while the run ended: OSError: no space"])],
)
def test_an_error_on_the_way_out_is_printed_by_the_rank_that_met_it(monkeypatch, end, printed):
    """Its code stays 0: with any other Lightning would kill the first rank, which may be saving."""
    said = []
    monkeypatch.setattr(stopping, "signum", 15)
    monkeypatch.setattr(stopping, "write_line", said.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as caught:
        leave_stopped(["fit"], end)
    assert (caught.value.code, said) == (0, printed)


@pytest.mark.parametrize("grace_s", [0, -1.0])
def test_a_grace_is_above_zero(grace_s):
    with pytest.raises(ConfigError, match=r"stop_signals.grace_s must be above 0"):
        StopSignals(grace_s)
