"""Warnings of a run that cannot learn or has not learned, and the hyperparameters that loggers receive."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from fuchsia_pl.callbacks.hyperparameters import HyperparameterLog
from fuchsia_pl.callbacks.outcome import Outcome
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.policy.schedules import TransformersSchedule
from tests.doubles import Constant, TinyEngine, make_data, make_module, make_trainer


def warnings_of(caplog) -> list[str]:
    return [f"warning: {record.getMessage()}" for record in caplog.records if record.name.endswith(".outcome")]


@pytest.mark.parametrize(("lr", "enabled", "is_low"), [(9e-7, True, True), (1e-6, True, False), (9e-7, False, False)])
def test_a_rate_too_low_for_an_adapter_is_told(tiny_model, tmp_path, caplog, lr, enabled, is_low):
    """With all weights trained, such rates are usual. A warm-up begins at 0, which does not count as a low rate."""
    module = make_module(tiny_model, optimizer=partial(torch.optim.AdamW, lr=lr), enabled=enabled)
    module.lr_scheduler = partial(TransformersSchedule, name="constant_with_warmup", num_warmup_steps=2)
    make_trainer(tmp_path, Outcome(), max_steps=1).fit(module, datamodule=make_data(module))
    told = ["warning: the learning rate is 9e-07, and an adapter hardly learns below 1e-06"]
    assert [line[: len(told[0])] for line in warnings_of(caplog)] == (told if is_low else [])


def test_a_resumed_run_that_is_over_already_says_so(tiny_model, tmp_path, caplog):
    module, outcome = make_module(tiny_model), Outcome()
    trainer = make_trainer(tmp_path, outcome, max_steps=2)
    trainer.fit(module, datamodule=make_data(module))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert warnings_of(caplog) == []
    trainer = make_trainer(tmp_path, outcome, max_steps=2, max_epochs=-1)
    trainer.fit(module, datamodule=make_data(module), ckpt_path=tmp_path / "x.ckpt")
    (line,) = warnings_of(caplog)
    assert line == "warning: nothing was trained: trainer.max_steps=2 is reached already, at step 2. Raise it"


@pytest.mark.parametrize(
    ("environment", "settings", "words"),
    [
        (Constant(), {"max_steps": 2}, "all 2 steps were skipped, since no rollout had an advantage"),
        (None, {"limit_train_batches": 0}, "trainer.limit_train_batches is 0. Leave it out"),
        (None, {"max_epochs": 0}, "trainer.max_epochs=0 is reached already, at epoch 0. Raise it"),
    ],
    ids=["no spread", "no batches", "no epochs"],
)
def test_a_finished_run_that_trained_nothing_says_why(tiny_model, tmp_path, caplog, environment, settings, words):
    module = make_module(tiny_model)
    make_trainer(tmp_path, Outcome(), **settings).fit(module, datamodule=make_data(module, environment=environment))
    (line,) = warnings_of(caplog)
    assert line == f"warning: nothing was trained: {words}" or line.startswith(
        f"warning: nothing was trained: {words}; see"
    )


def test_a_run_whose_steps_were_skipped_for_two_causes_counts_both(tiny_model, caplog):
    outcome, trainer = Outcome(), SimpleNamespace(global_step=0, is_global_zero=True, optimizers=[], max_epochs=1)
    trainer.lightning_module = module = make_module(tiny_model)
    module.skip_reason = "a cause"
    outcome.on_train_start(trainer, module)
    for step in range(10):
        trainer.global_step = step + 1
        reason = "no rollout has an advantage" if step < 9 else None
        batch = SimpleNamespace(step=SimpleNamespace(skip_reason=reason))
        outcome.on_train_batch_end(trainer, module, None, batch, step)
    outcome.on_fit_end(trainer, module)
    assert warnings_of(caplog) == [
        "warning: nothing was trained: all 10 steps were skipped: in 9 no rollout had an advantage, see train/skipped and "
        "reward/*; in 1 numbers were not finite, see train/nonfinite"
    ]


class Served(TinyEngine):
    """An engine with a key."""

    api_key = "sk-secret"


def test_loggers_get_what_runs_are_compared_by_and_no_secrets(tiny_model, tmp_path):
    module = make_module(tiny_model, LossConfig("dapo", beta=0.5), optimizer=partial(torch.optim.AdamW, lr=3e-4))
    module.lr_scheduler = partial(TransformersSchedule, name="cosine", num_warmup_steps=1, num_training_steps=4)
    loggers = [CSVLogger(tmp_path, name="", version=name) for name in ("one", "two")]
    trainer = make_trainer(tmp_path, HyperparameterLog(), max_steps=1, logger=loggers)
    trainer.fit(module, datamodule=make_data(module, Served(), seed=7))
    texts = [(tmp_path / name / "hparams.yaml").read_text() for name in ("one", "two")]
    assert texts[0] == texts[1]
    assert "secret" not in texts[0]
    found = yaml.safe_load(texts[0])  # plain YAML: no tags of Python
    assert found["model"]["name"] == str(tiny_model)
    assert (found["model"]["lora"]["r"], found["model"]["dtype"]) == (4, "float32")
    assert (found["objective"]["loss_type"], found["objective"]["beta"]) == ("dapo", 0.5)
    assert found["objective"]["clip_high"] == 0.28  # the value of the preset
    assert (found["optimizer"]["class"], found["optimizer"]["lr"]) == (
        "AdamW",
        3e-4,
    )  # not the 0 at the start of a warm-up
    assert found["lr_scheduler"] == "TransformersSchedule"
    assert found["data"]["sampling"]["group_size"] == 4
    assert (found["data"]["batch_size"], found["data"]["seed"], found["data"]["engine"]) == (5, 7, "Served")
    assert found["trainer"]["max_steps"] == 1
