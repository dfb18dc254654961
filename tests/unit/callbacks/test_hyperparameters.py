"""The hyperparameters that loggers receive."""

from functools import partial

import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from fuchsia_pl.callbacks.hyperparameters import HyperparameterLog
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.policy.schedules import TransformersSchedule
from tests.doubles import TinyEngine, make_data, make_module, make_trainer


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
