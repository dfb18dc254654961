"""Training with a user's own advantage and surrogate."""

import torch

from fuchsia_pl.objectives import advantages, credit, surrogates
from fuchsia_pl.objectives.config import LossConfig
from tests.doubles import make_data, make_module, make_trainer


def copied_advantage(inputs, over_ranks):
    """A copy of `group_norm`."""
    return inputs.per_token(advantages.group_norm_advantages(inputs.rewards)), None


def copied_loss(inputs):
    """A copy of `clip` without the dual clip."""
    ratio, settings = inputs.log_ratio.exp(), inputs.settings
    bounded = ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    gain = torch.minimum(ratio * inputs.advantages, bounded * inputs.advantages)
    return -gain, gain < ratio * inputs.advantages


def half_advantage(inputs, over_ranks):
    values, targets = credit.group_norm(inputs, over_ranks)
    return 0.5 * values, targets


def half_loss(inputs):
    losses, bounded = surrogates.clip(inputs)
    return 0.5 * losses, bounded


def trained(tiny_model, root, **settings) -> list[torch.Tensor]:
    torch.manual_seed(0)
    module = make_module(tiny_model, LossConfig("grpo", **settings), optimizer=lambda p: torch.optim.SGD(p, lr=0.3))
    trainer = make_trainer(root, max_steps=2)
    trainer.fit(module, datamodule=make_data(module))
    assert trainer.global_step == 2
    return [parameter.detach().clone() for parameter in module.policy.trainable_parameters()]


def test_own_functions_train_as_the_built_in_ones_and_are_not_ignored(tiny_model, tmp_path):
    here = "tests.unit.test_own_objective"
    built_in = trained(tiny_model, tmp_path / "built_in")
    copied = trained(
        tiny_model, tmp_path / "own", advantage=f"{here}.copied_advantage", surrogate=f"{here}.copied_loss"
    )
    assert all(torch.equal(one, other) for one, other in zip(built_in, copied, strict=True))
    for change in ({"advantage": f"{here}.half_advantage"}, {"surrogate": f"{here}.half_loss"}):
        changed = trained(tiny_model, tmp_path / next(iter(change)), **change)
        assert not all(torch.equal(one, other) for one, other in zip(built_in, changed, strict=True))
