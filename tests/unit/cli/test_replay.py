"""A recorded step is reproduced bit for bit, without an engine."""

import pytest
import torch
from lightning.pytorch import Callback

from fuchsia_pl.callbacks.finite import FiniteGuard
from fuchsia_pl.callbacks.recorded_step import read_step, record_step
from fuchsia_pl.cli.replay import replay, replay_step
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.types import ConfigError
from tests.doubles import TinyEnvironment, make_data, make_module, make_trainer


class Recorder(Callback):
    """Records a healthy step, and keeps what it computed."""

    def __init__(self, file, step: int) -> None:
        self.file, self.step, self.batches, self.losses = file, step, [], []
        self.gradients: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches = [*self.batches, batch][-2:]

    def on_before_backward(self, trainer, pl_module, loss):
        self.losses = [*self.losses, loss.detach()][-2:]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            record_step(self.file, trainer, pl_module, self.batches, torch.stack(self.losses))
            named = pl_module.policy.named_parameters()
            self.gradients = {name: p.grad.clone() for name, p in named if p.requires_grad}
            self.kept = torch.stack(self.losses)


@pytest.mark.parametrize("loss", [LossConfig(beta=0.01), LossConfig(num_policy_updates=2)], ids=["kl", "second update"])
def test_losses_and_gradients_of_a_step_are_reproduced_bit_for_bit(tiny_model, tmp_path, loss):
    recorder = Recorder(tmp_path / "step.pt", step=1)
    module = make_module(tiny_model, loss, dropout=0.3)
    trainer = make_trainer(tmp_path, recorder, accumulate_grad_batches=2, max_steps=2)
    trainer.fit(module, datamodule=make_data(module, steps_per_epoch=2))
    replayed = replay_step(read_step(recorder.file), tmp_path)
    assert torch.equal(replayed.losses, recorder.kept)
    assert replayed.gradients.keys() == recorder.gradients.keys()
    assert all(torch.equal(replayed.gradients[name], gradient) for name, gradient in recorder.gradients.items())
    assert (replayed.same_losses, replayed.same_gradients) == (True, True)
    # Another token is another step.
    content = torch.load(recorder.file, weights_only=True)
    content["batches"][0]["advantages"][0] += 0.5
    torch.save(content, recorder.file)
    assert replay_step(read_step(recorder.file), tmp_path).same_gradients is False
    assert replay([str(recorder.file)]) == 1


class Endless(TinyEnvironment):
    """Rewards that are finite, and whose gradient is not."""

    def __init__(self) -> None:
        super().__init__()

        def huge(rollouts, *args, **kwargs):
            return [1e38 * (r.sibling % 2) for r in rollouts]

        self.reward_functions, self.reward_weights = [huge], {}


def test_a_step_that_was_skipped_is_left_behind_and_fails_again(tiny_model, tmp_path, capsys):
    module = make_module(tiny_model, LossConfig("dr_grpo"))
    trainer = make_trainer(tmp_path, FiniteGuard(), accumulate_grad_batches=2, max_steps=1)
    trainer.fit(module, datamodule=make_data(module, environment=Endless()))
    file = tmp_path / "nonfinite/step-1.pt"
    assert replay([str(file)]) == 0
    printed = capsys.readouterr().out
    assert "gradients are not finite: model." in printed
    assert "step 1: losses are the same bit for bit, gradients are the same bit for bit" in printed


def test_what_is_no_recorded_step_is_refused_in_one_line(tmp_path, capsys):
    file = tmp_path / "x.pt"
    with pytest.raises(ConfigError, match="does not exist"):
        read_step(file)
    file.write_text("hello")
    with pytest.raises(ConfigError, match="is damaged, cut off"):
        read_step(file)
    torch.save({"batches": []}, file)
    with pytest.raises(ConfigError, match="is no step that a run recorded"):
        read_step(file)
    with pytest.raises(SystemExit) as caught:
        replay([str(file)])
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
