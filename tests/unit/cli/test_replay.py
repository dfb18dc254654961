"""A recorded step is reproduced bit for bit, without an engine."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from fuchsia_pl.callbacks.finite import FiniteGuard
from fuchsia_pl.callbacks.recorded_step import read_step
from fuchsia_pl.cli import FuchsiaCLI
from fuchsia_pl.cli.replay import replay, replay_step
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.types import ConfigError
from tests.doubles import TinyEnvironment, make_data, make_module, make_trainer
from tests.unit.policy.test_adapter import Touches
from tests.unit.test_checkpoints import fit, last_of
from tests.unit.test_cli import config, refused

__all__ = ["config"]  # the fixture


class Kept(Callback):
    """Keeps losses and gradients of the last step of two micro-batches."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def on_before_backward(self, trainer, pl_module, loss):
        self.losses = [*self.losses, loss.detach().clone()][-2:]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = pl_module.policy.named_parameters()
        self.gradients = {name: p.grad.clone() for name, p in named if p.requires_grad}


@pytest.mark.parametrize(
    "loss",
    [LossConfig(beta=0.01), LossConfig(num_policy_updates=2), LossConfig(mini_batches=2)],
    ids=["kl", "second update", "second mini-batch"],
)
def test_losses_and_gradients_of_a_step_are_reproduced_bit_for_bit(tiny_model, tmp_path, loss):
    kept, module = Kept(), make_module(tiny_model, loss, dropout=0.3)
    callbacks = [FiniteGuard(record_steps=(2,)), kept]
    trainer = make_trainer(tmp_path, *callbacks, accumulate_grad_batches=2, max_steps=2, gradient_clip_val=0.01)
    trainer.fit(module, datamodule=make_data(module, batch_size=2, steps_per_epoch=2))
    file = tmp_path / "recorded/step-2.pt"
    assert list(file.parent.iterdir()) == [file]
    replayed = replay_step(read_step(file), tmp_path)
    assert torch.equal(replayed.losses, torch.stack(kept.losses))
    assert replayed.gradients.keys() == kept.gradients.keys()
    assert all(torch.equal(replayed.gradients[name], gradient) for name, gradient in kept.gradients.items())
    assert (replayed.same_losses, replayed.same_gradients) == (True, True)
    # Another advantage makes another step.
    content = torch.load(file, weights_only=True)
    content["batches"][0]["advantages"][0] += 0.5
    torch.save(content, file)
    assert replay_step(read_step(file), tmp_path).same_gradients is False
    assert replay([str(file)]) == 1


class Endless(TinyEnvironment):
    """Finite rewards with an infinite gradient norm."""

    def __init__(self) -> None:
        super().__init__()

        def huge(rollouts, *args, **kwargs):
            return [1e38 * (r.sibling % 2) for r in rollouts]

        self.reward_functions, self.reward_weights = [huge], {}


class Poisoned(Callback):
    """Gives the second micro-batch an impossible sampling logprob."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            batch.sampling_logprobs[batch.loss_mask] = torch.nan


def test_a_gradient_that_is_endless_as_a_whole_is_found_again(tiny_model, tmp_path, capsys):
    module = make_module(tiny_model, LossConfig("dr_grpo"))
    trainer = make_trainer(tmp_path, FiniteGuard(), accumulate_grad_batches=2, max_steps=1)
    trainer.fit(module, datamodule=make_data(module, environment=Endless(), batch_size=2))
    assert replay([str(tmp_path / "recorded/step-1.pt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    # Gradients of about 1e29 fit into float32, but their squares, from which the norm is computed, do not.
    assert lines[0] == "step 1, recorded on cpu, computed on cpu in 32-true"
    assert lines[1] == "trained weights: 0 of 28 are not finite"
    assert [line.partition(":")[0] for line in lines[2:4]] == ["micro-batch 1", "micro-batch 2"]
    assert "not finite" not in lines[2] + lines[3]
    assert lines[4:] == [
        "gradient norm: inf, recorded inf",
        "gradients: 0 of 28 are not finite",
        "losses: the same bit for bit; gradients: the same bit for bit",
    ]


def test_the_tensor_that_a_nan_comes_from_is_named(tiny_model, tmp_path, capsys):
    module = make_module(tiny_model)
    trainer = make_trainer(tmp_path, FiniteGuard(), Poisoned(), accumulate_grad_batches=2, max_steps=1)
    trainer.fit(module, datamodule=make_data(module, batch_size=2))
    assert replay([str(tmp_path / "recorded/step-1.pt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "not finite" not in lines[2]
    assert lines[3] == "micro-batch 2: loss nan, recorded nan; not finite: the sampler's logprobs"
    assert lines[4].startswith("metrics that are not finite: ")
    assert {"train/sampler_ratio", "train/loss"} < set(lines[4].partition(": ")[2].split(", "))
    assert "train/entropy" not in lines[4]
    assert lines[5] == "gradient norm: nan, recorded nan"
    assert lines[6].startswith("gradients: 28 of 28 are not finite (model.")
    assert lines[7] == "losses: the same bit for bit; gradients: the same bit for bit"


@pytest.mark.parametrize("kind", ["missing", "text", "torn", "overwritten", "foreign", "older", "code"])
def test_what_is_no_recorded_step_is_refused_in_one_line(tmp_path, capsys, kind):
    file, touched = tmp_path / "x.pt", tmp_path / "touched"
    words = {"missing": "does not exist", "foreign": "TypeError", "older": "KeyError: 'info'", "code": "Unpickling"}
    if kind == "text":
        file.write_text("hello")
    elif kind in ("torn", "overwritten"):
        torch.save({"batches": [], "weights": torch.zeros(9000)}, file)
        whole = file.read_bytes()
        file.write_bytes(whole[:-100] if kind == "torn" else whole[:9000] + bytes([7] * 4096) + whole[13096:])
    elif kind != "missing":
        torch.save({"foreign": [1, 2], "older": {"weights": {}}, "code": Touches(touched)}[kind], file)
    with pytest.raises(SystemExit) as caught:
        replay([str(file)])
    assert caught.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ")
    assert words.get(kind, "is damaged, cut off, or not a recorded step of this program") in said
    assert not touched.exists()


def test_a_recorded_step_of_another_model_is_refused(tiny_model, tmp_path, monkeypatch):
    module = make_module(tiny_model)
    trainer = make_trainer(tmp_path, FiniteGuard(record_steps=(1,)), max_steps=1)
    trainer.fit(module, datamodule=make_data(module, batch_size=2))
    file = tmp_path / "recorded/step-1.pt"
    content = torch.load(file, weights_only=True)
    weights, settings = dict(content["weights"]), content["settings"]
    content["weights"].popitem()
    torch.save(content, file)
    with pytest.raises(ConfigError, match=r"has other weights than the recorded step: model\..* is unexpected"):
        replay_step(read_step(file), tmp_path)
    # The record contains no template, and the template's file may be gone.
    gone = {**settings, "policy": {**settings["policy"], "chat_template": str(tmp_path / "gone.jinja")}}
    torch.save({**content, "weights": weights, "settings": gone}, file)
    monkeypatch.setattr("fuchsia_pl.cli.replay.Trainer", lambda **given: pytest.fail(given["accelerator"]))
    with pytest.raises(pytest.fail.Exception, match=r"^cpu$"):
        replay_step(read_step(file), tmp_path)
    torch.save({**content, "weights": weights, "settings": {**settings, "loss": {"no_such": 1}}}, file)
    with pytest.raises(ConfigError, match=r"settings of the recorded step are not of this version: .*no_such"):
        replay_step(read_step(file), tmp_path)
    torch.save({**content, "weights": weights, "step": "one"}, file)
    with pytest.raises(ConfigError, match="TypeError: its step is a str"):
        read_step(file)


def test_the_command_records_steps_replays_them_and_keeps_checkpoints_as_set(config, capsys, monkeypatch, caplog):
    fit(config, "--finite_guard.record_steps", "[2,9]", "--checkpoint.keep", "1", "--checkpoint.every_n_steps", "1")
    file = Path("runs/tiny/0/recorded/step-2.pt")
    assert list(file.parent.iterdir()) == [file]
    assert "finite_guard.record_steps: [9] are no steps of this run" in caplog.text
    assert [path.name for path in last_of(0).parent.iterdir()] == ["last.ckpt"]
    assert "must be numbers of steps, counted from 1, got [0]" in refused(
        capsys, "fit", "--config", str(config), "--finite_guard.record_steps", "[0]"
    )
    monkeypatch.setattr("tests.doubles.TinyEngine.start", lambda *args: pytest.fail("the engine was started"))
    monkeypatch.setattr("tests.doubles.TinyEnvironment.__init__", lambda *args: pytest.fail("an environment was made"))
    capsys.readouterr()
    assert replay([str(file)]) == 0
    assert "losses: the same bit for bit; gradients: the same bit for bit" in capsys.readouterr().out


def test_the_command_stops_after_as_many_steps_as_set(config):
    endless = ("--data.environment", "tests.unit.cli.test_replay.Endless", "--model.loss.loss_type", "dr_grpo")
    assert fit(config, *endless).trainer.global_step == 2
    files = [Path(f"runs/tiny/0/recorded/step-{step}.pt") for step in (1, 2)]
    assert sorted(files[0].parent.iterdir()) == files
    with pytest.raises(RuntimeError, match=r"^step 1: .*finite_guard.max_nonfinite_steps is 1"):
        FuchsiaCLI(["fit", "--config", str(config), *endless, "--finite_guard.max_nonfinite_steps", "1"])
