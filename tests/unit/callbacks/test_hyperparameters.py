"""The hyperparameters that loggers receive."""

from functools import partial
from types import SimpleNamespace

import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from fuchsia_pl.callbacks.hyperparameters import HyperparameterLog, public_settings
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.policy.schedules import TransformersSchedule
from tests.doubles import TinyEngine, TinyEnvironment, make_data, make_module, make_trainer


class Served(TinyEngine):
    """An engine with keys."""

    api_key = "sk-secret"

    def __init__(self) -> None:
        super().__init__()
        self.api_key = "sk-secret"
        self.urls = ["http://127.0.0.1:8000", "https://me:secret@host/v1"]
        self.headers = {"x": "secret"}


class Sized(TinyEnvironment):
    def __init__(self, max_value: int = 99) -> None:
        super().__init__()
        self.max_value = max_value
        self.kinds = ["product", "sum"]
        self.judge = "hf_secretsecretsecret"


def test_loggers_get_what_runs_are_compared_by_and_no_secrets(tiny_model, tmp_path):
    module = make_module(tiny_model, LossConfig("dapo", beta=0.5), optimizer=partial(torch.optim.AdamW, lr=3e-4))
    module.lr_scheduler = partial(TransformersSchedule, name="cosine", num_warmup_steps=1, num_training_steps=4)
    loggers = [CSVLogger(tmp_path, name="", version=name) for name in ("one", "two")]
    trainer = make_trainer(tmp_path, HyperparameterLog(), max_steps=1, logger=loggers)
    trainer.fit(module, datamodule=make_data(module, Served(), Sized(7), seed=7))
    texts = [(tmp_path / name / "hparams.yaml").read_text() for name in ("one", "two")]
    assert texts[0] == texts[1]
    assert "secret" not in texts[0]
    found = yaml.safe_load(texts[0])  # plain YAML: no tags of Python
    assert found["model"]["name"] == str(tiny_model)
    assert (found["model"]["lora"]["r"], found["model"]["dtype"]) == (4, "float32")
    assert (found["objective"]["loss_type"], found["objective"]["beta"]) == ("dapo", 0.5)
    assert found["objective"]["clip_high"] == 0.28  # the value of the preset
    rate = (found["optimizer"]["class"], found["optimizer"]["lr"])
    assert rate == ("AdamW", 3e-4)  # not the 0 at the start of a warm-up
    assert found["lr_scheduler"]["class"].endswith("TransformersSchedule")
    data = found["data"]
    assert (data["batch_size"], data["rows_per_step"], data["seed"]) == (5, 20, 7)
    assert data["sampling"]["group_size"] == 4
    assert data["engine"]["class"].endswith("Served")
    assert data["engine"]["applied"] == 1.0
    assert data["environment"]["class"].endswith("Sized")
    assert (data["environment"]["max_value"], data["environment"]["kinds"]) == (7, ["product", "sum"])
    assert data["rewards"] == {"even": 1.0, "ended": 0.5}
    assert found["trainer"]["max_steps"] == 1
    sizes = found["sizes"]
    assert 0 < sizes["trained_parameters"] < sizes["parameters"]


def test_secrets_are_left_out_wherever_they_are():
    shown = {"max_tokens": 5, "ratio": 0.5, "name": "a", "weights": {"form": 0.1}, "kinds": ("x", "y"), "seed": None}
    hidden = {
        "token": "abc",
        "openai_api_key": "abc",
        "password": "abc",
        "headers": {"Accept": "json"},
        "judge": {"api_key": "abc"},
        "server": "https://me:pw@host",
        "text": "Bearer abc",
        "other": "ghp_0123456789",
        "urls": ["http://a", "http://me:pw@b"],
        "_private": 1,
        "model": object(),
        "rows": list(range(1000)),
    }
    expected = {**shown, "kinds": ["x", "y"]}
    assert public_settings({**shown, **hidden}) == expected
    assert public_settings({"text": "x" * 9999})["text"] == "x" * 500


def test_only_the_first_rank_logs():
    """A logger of another rank is a dummy, whose methods return None."""
    HyperparameterLog().on_train_start(SimpleNamespace(is_global_zero=False), None)
