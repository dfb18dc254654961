"""Without the command: a plain Trainer in a script, and in the cell of a notebook, whose thread runs an event loop."""

import asyncio

import pytest
from lightning.pytorch import Trainer

from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.callbacks.hotswap import HotSwap
from fuchsia_pl.callbacks.preflight import Preflight
from fuchsia_pl.types import ConfigError
from tests.doubles import TinyEngine, make_data, make_module


def test_a_plain_trainer_with_adapter_sync_trains(tiny_model, tmp_path, monkeypatch):
    """Lightning's own defaults: a logger, a bar, a checkpoint per epoch, 2 held-out items before training."""
    monkeypatch.chdir(tmp_path)
    module, engine = make_module(tiny_model), TinyEngine()
    trainer = Trainer(max_steps=2, callbacks=[AdapterSync(tolerance=1e-3)], accelerator="cpu")
    trainer.fit(module, datamodule=make_data(module, engine, steps_per_epoch=2))
    assert trainer.global_step == 2
    assert [version for kind, version in engine.calls if kind == "load"] == [0, 1, 2]
    assert engine.calls.count(("generate", 0)) == 2 + 5 * 4  # sanity check, then 5 items of 4 siblings
    assert engine.calls.count(("generate", 2)) == 4  # all held-out items after the epoch
    assert "train/loss" in trainer.callback_metrics
    assert trainer.validate(module, datamodule=make_data(module, engine), verbose=False)


def test_in_a_notebook_cell_engine_and_trainer_take_turns_and_sync(tiny_model, tmp_path):
    module, engine = make_module(tiny_model), TinyEngine()

    async def cell() -> None:
        callbacks = [Preflight(), HotSwap(True), AdapterSync(tolerance=1e-3)]
        quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        trainer = Trainer(max_steps=2, callbacks=callbacks, accelerator="cpu", default_root_dir=tmp_path, **quiet)
        trainer.fit(module, datamodule=make_data(module, engine))

    asyncio.run(cell())
    assert {kind for kind, _ in engine.calls} == {"sleep", "wake", "load", "generate"}
    assert ("load", 2) in engine.calls


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_a_trainer_without_adapter_sync_is_refused_by_name(tiny_model, tmp_path, verb):
    module, engine = make_module(tiny_model), TinyEngine()
    trainer = Trainer(max_steps=2, accelerator="cpu", default_root_dir=tmp_path, logger=False)
    with pytest.raises(
        ConfigError, match=r"the trainer has no AdapterSync.*add fuchsia_pl.callbacks.adapter_sync.AdapterSync\(\)"
    ):
        getattr(trainer, verb)(module, datamodule=make_data(module, engine))
    assert not hasattr(engine, "spec")
