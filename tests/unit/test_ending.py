"""The end of a run closes everything that it started, also after an error."""

import pytest

from fuchsia_pl import datamodule
from fuchsia_pl.types import ConfigError
from tests.doubles import TinyEngine, TinyEnvironment, make_data, make_module, make_trainer


@pytest.mark.parametrize("what", ["phases", "environment"])
def test_what_closing_raises_does_not_hide_what_ended_the_run(tiny_model, tmp_path, monkeypatch, what, caplog):
    closed = []

    class Failing(TinyEnvironment):
        async def close(self):
            closed.append(1)
            if what == "environment":
                raise OSError("the server is gone")

    async def cancel(self):
        raise TimeoutError

    def fail(self, batch, batch_idx):
        raise LookupError("no loss")

    if what == "phases":
        monkeypatch.setattr(datamodule.PhasesAhead, "cancel", cancel)
    monkeypatch.setattr("fuchsia_pl.module.GRPOModule.training_step", fail)
    module, engine = make_module(tiny_model), TinyEngine()
    with pytest.raises(LookupError, match="no loss"):
        make_trainer(tmp_path, max_steps=1).fit(module, datamodule=make_data(module, engine, Failing()))
    assert closed
    assert engine._model is None
    assert "could not be closed" in caplog.text


def test_the_engine_is_closed_at_the_end_and_after_a_failure(tiny_model, tmp_path):
    class Failing(TinyEnvironment):
        def messages(self, item):
            raise LookupError("no question")

    for environment in (TinyEnvironment(), Failing()):
        module, engine = make_module(tiny_model), TinyEngine()
        data = make_data(module, engine, environment)
        trainer = make_trainer(tmp_path, max_steps=1)
        if isinstance(environment, Failing):
            with pytest.raises(ConfigError, match="no question"):
                trainer.fit(module, datamodule=data)
        else:
            trainer.fit(module, datamodule=data)
        assert engine._model is None
