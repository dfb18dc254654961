"""Access of callbacks to a run, and the errors that name their requirements."""

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel, RandomDataset
from torch.utils.data import DataLoader

from fuchsia_pl.callbacks.access import callbacks_of, data_of, is_trial, module_of, policy_of
from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.callbacks.outcome import Outcome
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.types import ConfigError
from tests.doubles import TinyEngine, make_data, make_module, make_trainer


def test_parts_of_a_run_are_found(tiny_model, tmp_path):
    module, outcome = make_module(tiny_model), Outcome()
    data = make_data(module)
    trainer = make_trainer(tmp_path, outcome, max_steps=1)
    trainer.fit(module, datamodule=data)
    assert module_of(trainer) is module
    assert isinstance(policy_of(trainer), Policy)
    assert data_of(trainer) is data
    assert callbacks_of(trainer, Outcome) == [outcome]
    assert callbacks_of(trainer, AdapterSync) == [trainer.callbacks[1]]
    assert [is_trial(trainer), is_trial(Trainer(fast_dev_run=True, accelerator="cpu", logger=False))] == [False, True]


def test_a_trainer_without_parts_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ConfigError, match=r"has no module, .* require a fuchsia_pl\.module\.GRPOModule"):
        module_of(trainer)
    with pytest.raises(
        ConfigError, match=r"has no data module, .* require a fuchsia_pl\.datamodule\.RolloutDataModule"
    ):
        data_of(trainer)


def test_another_module_is_refused_before_the_engine_starts(tiny_model, tmp_path):
    engine = TinyEngine()
    with pytest.raises(ConfigError, match=r"has a BoringModel as its module, .*GRPOModule: pass one as `model`"):
        make_trainer(tmp_path).fit(BoringModel(), datamodule=make_data(make_module(tiny_model), engine))
    assert not hasattr(engine, "spec")


@pytest.mark.parametrize("given", [{}, {"datamodule": BoringDataModule()}], ids=["none", "another"])
def test_another_data_module_is_refused_before_training(tiny_model, tmp_path, given):
    module = make_module(tiny_model)
    found = "a BoringDataModule as its data module" if given else "no data module"
    loaders = {} if given else {"train_dataloaders": DataLoader(RandomDataset(4, 4))}
    with pytest.raises(ConfigError, match=f"has {found}, .*RolloutDataModule: pass one as `datamodule`"):
        make_trainer(tmp_path).fit(module, **given, **loaders)
    assert module.policy is None
