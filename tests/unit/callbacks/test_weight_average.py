"""An average of the trained weights: its values by hand, its users, and a resumed run that continues with both."""

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from fuchsia_pl.callbacks.adapter_export import AdapterExport
from fuchsia_pl.callbacks.adapter_sync import AdapterSync, SyncError
from fuchsia_pl.callbacks.run_checkpoint import RunCheckpoint
from fuchsia_pl.callbacks.weight_average import WeightAverage
from fuchsia_pl.policy.contents import AVERAGED_WEIGHTS
from fuchsia_pl.types import ConfigError
from tests.doubles import TinyEngine, make_data, make_module, make_trainer

SGD = partial(torch.optim.SGD, lr=1.0)


def trained(module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


class Learned(Callback):
    """Keeps the weights before training and after each optimizer step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer, pl_module):
        self.weights.append(trained(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights.append(trained(pl_module))


class Received(TinyEngine):
    """Keeps one tensor and the version of each adapter that it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.received: list[tuple[int, torch.Tensor]] = []

    async def load_weights(self, path: Path, version: int) -> None:
        await super().load_weights(path, version)
        self.received.append((version, load_file(path / "adapter_model.safetensors")[first(path)]))


def first(folder: Path) -> str:
    """The name of one B, which is 0 before training."""
    return next(name for name in sorted(load_file(folder / "adapter_model.safetensors")) if "lora_B" in name)


def fit(tiny_model, root, average, *callbacks, engine=None, ckpt_path=None, **settings):
    torch.manual_seed(0)
    module = make_module(tiny_model, optimizer=SGD)
    settings = {"max_epochs": -1, "max_steps": 4, "limit_val_batches": 1.0, "enable_checkpointing": True, **settings}
    parts = [average, *callbacks, AdapterExport(), RunCheckpoint(every_n_steps=2)]
    trainer = make_trainer(root, *parts, **settings)
    trainer.fit(module, datamodule=make_data(module, engine, steps_per_epoch=2), ckpt_path=ckpt_path)
    return module, trainer


def averages(weights, decay: float, start_step: int = 0):
    """By its definition, in float64: a_k = decay a_(k-1) + (1 - decay) w_k, and a_k = w_k up to the start."""
    average = {name: w.double() for name, w in weights[0].items()}
    yield average
    for step, learned in enumerate(weights[1:], start=1):
        kept = 0.0 if step <= start_step else decay
        average = {name: kept * average[name] + (1 - kept) * w.double() for name, w in learned.items()}
        yield average


def assert_close(found, expected) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name].double(), expected[name], rtol=1e-5, atol=1e-7) for name in found)


@pytest.mark.parametrize(("decay", "start_step"), [(0.5, 0), (0.5, 2), (0.0, 0)])
def test_the_average_by_hand_is_in_module_checkpoint_and_export(tiny_model, tmp_path, decay, start_step):
    learned = Learned()
    module, _ = fit(tiny_model, tmp_path, WeightAverage(decay, start_step), learned, limit_val_batches=0)
    *_, expected = averages(learned.weights, decay, start_step)
    assert_close(trained(module), expected)
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert_close(checkpoint[AVERAGED_WEIGHTS], expected)
    assert_close(checkpoint["state_dict"], {name: w.double() for name, w in learned.weights[-1].items()})
    assert all("lora_" in name for name in [*checkpoint["state_dict"], *checkpoint[AVERAGED_WEIGHTS]])
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    exported = {f"policy.model.{name}".replace(".weight", ".default.weight"): tensor for name, tensor in saved.items()}
    assert_close(exported, expected)
    assert decay == 0.0 or not torch.equal(
        *(next(w for name, w in part.items() if "lora_B" in name) for part in (trained(module), learned.weights[-1]))
    )


def test_held_out_items_are_sampled_with_the_average_and_training_goes_on_with_the_weights(tiny_model, tmp_path):
    engine, learned = Received(), Learned()
    fit(tiny_model, tmp_path, WeightAverage(0.5), learned, engine=engine)
    # after each epoch of 2 steps: the weights of the step, then the average, then the weights again
    assert [version for version, _ in engine.received] == [0, 1, 2, 2, 2, 3, 4, 4, 4]
    name = "policy.model." + first(tmp_path / "adapter").replace(".weight", ".default.weight")
    average = [values[name] for values in averages(learned.weights, 0.5)]
    weights = [values[name].double() for values in learned.weights]
    steps = [weights[0], weights[1], weights[2], average[2], weights[2], weights[3], weights[4], average[4], weights[4]]
    for (_, found), expected in zip(engine.received, steps, strict=True):
        assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_figures_of_the_run_are_those_of_its_checkpoint(tiny_model, tmp_path):
    """Also without the callback; the metrics of the raw weights are different."""
    _, trainer = fit(tiny_model, tmp_path, WeightAverage(0.9))
    within = float(trainer.callback_metrics["validation/reward/even"])
    module = make_module(tiny_model, optimizer=SGD)
    again = make_trainer(tmp_path, limit_val_batches=1.0)
    path = tmp_path / "checkpoints/last.ckpt"
    (figures,) = again.validate(module, datamodule=make_data(module), ckpt_path=path, verbose=False)
    assert figures["validation/reward/even"] == within
    checkpoint = torch.load(path, weights_only=True)
    assert all(torch.equal(w, checkpoint[AVERAGED_WEIGHTS][name]) for name, w in trained(module).items())


def test_a_resumed_run_goes_on_with_weights_and_average_bit_for_bit(tiny_model, tmp_path):
    fit(tiny_model, tmp_path / "straight", WeightAverage(0.5))
    fit(tiny_model, tmp_path / "first", WeightAverage(0.5), max_steps=2)
    saved = tmp_path / "first/checkpoints/last.ckpt"
    fit(tiny_model, tmp_path / "second", WeightAverage(0.5), ckpt_path=saved)
    one, other = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("straight", "second")
    )
    for key in ("state_dict", AVERAGED_WEIGHTS):
        assert all(torch.equal(tensor, other[key][name]) for name, tensor in one[key].items())


@pytest.mark.parametrize("setting", [{"decay": 1.0}, {"decay": -0.1}, {"start_step": -1}], ids=str)
def test_a_setting_out_of_range_is_refused(setting):
    (name,) = setting
    with pytest.raises(ConfigError, match=rf"WeightAverage.{name} must be"):
        WeightAverage(**setting)


def test_what_an_average_does_not_work_with_is_refused_before_the_engine_starts(tiny_model, tmp_path):
    module, engine = make_module(tiny_model), TinyEngine()
    ahead = make_data(module, engine, sampling={"max_staleness": 1})
    with pytest.raises(ConfigError, match=r"WeightAverage and data.sampling.max_staleness=1"):
        make_trainer(tmp_path, WeightAverage()).fit(module, datamodule=ahead)
    light = ModelCheckpoint(dirpath=tmp_path, save_weights_only=True)
    with pytest.raises(ConfigError, match="save_weights_only would leave out"):
        fit(tiny_model, tmp_path, WeightAverage(), light, engine=engine)
    assert not hasattr(engine, "spec")


class Swaps(Callback):
    """A callback that replaces the weights for validation, here by an adapter without effect."""

    def on_validation_start(self, trainer, pl_module):
        self.kept = trained(pl_module)
        for name, parameter in pl_module.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()  # torch's version counters do not change

    def on_validation_epoch_end(self, trainer, pl_module):
        for name, parameter in pl_module.named_parameters():
            if name in self.kept:
                parameter.data.copy_(self.kept[name])


@pytest.mark.parametrize("last", [False, True], ids=["before AdapterSync", "after it"])
def test_whoever_swaps_weights_is_followed(tiny_model, tmp_path, last):
    """The version stays the same: only the content differs."""
    engine, module = Received(), make_module(tiny_model, optimizer=SGD)
    trainer = make_trainer(tmp_path, *([] if last else [Swaps()]), max_epochs=2, limit_val_batches=1.0)
    trainer.callbacks += [Swaps()] if last else []
    trainer.fit(module, datamodule=make_data(module, engine, steps_per_epoch=1))
    assert [version for version, _ in engine.received] == [0, 1, 1, 1, 2, 2, 2]
    assert [bool(tensor.any()) for _, tensor in engine.received] == [False, True, False, True, True, False, True]


def test_weights_that_change_between_sync_and_training_end_the_run(tiny_model, tmp_path):
    class Meddles(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            next(p for name, p in pl_module.named_parameters() if "lora_A" in name).data.add_(1e-4)

    module = make_module(tiny_model)
    trainer = make_trainer(tmp_path, sync=AdapterSync(tolerance=1.0))
    trainer.callbacks.append(Meddles())
    with pytest.raises(SyncError, match="changed outside of the optimizer after the engine got those of step 1"):
        trainer.fit(module, datamodule=make_data(module))
    module = make_module(tiny_model)
    make_trainer(tmp_path, Meddles(), max_steps=2).fit(module, datamodule=make_data(module))  # before AdapterSync
