"""A user's own advantage and surrogate: accepted functions, and functions that the config refuses."""

import sys

import pytest
import torch

from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.objectives.surrogates import SURROGATE_SETTINGS, SurrogateInputs
from fuchsia_pl.types import ConfigError

LOSS = """
import torch

def my_loss(inputs):
    ratio = inputs.log_ratio.exp()
    return -ratio * inputs.advantages, torch.zeros_like(inputs.loss_mask)
"""
ADVANTAGE = """
def my_advantage(inputs, over_ranks):
    return inputs.per_token(inputs.rewards.nan_to_num(nan=0.0) - 0.5), None
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes `my_module.py` into a folder of the path."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        sys, "dont_write_bytecode", True
    )  # a file of the same second and size would be read from the cache
    monkeypatch.delitem(sys.modules, "my_module", raising=False)

    def write(source: str) -> None:
        (tmp_path / "my_module.py").write_text(source)

    yield write
    sys.modules.pop("my_module", None)


def test_an_own_surrogate_may_use_every_setting(own):
    own(LOSS)
    config = LossConfig("grpo", surrogate="my_module.my_loss", clip_low=0.1, dual_clip=3.0, num_policy_updates=2)
    assert config.surrogate_spec.uses == SURROGATE_SETTINGS
    assert config.resolved()["surrogate"] == "my_module.my_loss"
    assert config.resolved()["clip_low"] == 0.1


def test_an_own_surrogate_is_tried_with_gradient_also_where_there_is_none(own):
    own(LOSS)
    with torch.no_grad():
        assert LossConfig("grpo", surrogate="my_module.my_loss").parts.surrogate == "my_module.my_loss"


def test_an_own_advantage_may_have_groups_of_one_and_refills(own):
    own(ADVANTAGE)
    assert LossConfig("dapo", advantage="my_module.my_advantage").parts.max_refills == 3


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "AttributeError: module 'my_module' has no attribute 'my_loss'"),
        ("raise OSError('no disk')", "cannot be imported: OSError: no disk"),
        ("from torch import relu as my_loss", r"must take \(inputs\): no signature found for builtin"),
        ("raise SystemExit(0)", "cannot be imported: SystemExit: 0"),
        ("def my_loss(inputs):\n    raise SystemExit(0)", "raised SystemExit: 0"),
        ("my_loss = 3", "is of type int: it must be a function"),
        (LOSS.replace("(inputs)", "(inputs, config)"), r"must take \(inputs\): missing a required argument"),
        (LOSS.replace("return -ratio", "raise KeyError(3)\n    return -ratio"), "raised KeyError: 3"),
        (
            LOSS.replace(", torch.zeros_like(inputs.loss_mask)", ""),
            "returned a Tensor: it must return a loss and a bool",
        ),
        (
            LOSS.replace("* inputs.advantages,", "* inputs.advantages.sum(dim=1),").replace(
                "-ratio", "-ratio.sum(dim=1)"
            ),
            r"returned losses of torch.float32 \[2\]: it must be a float tensor of shape \[2, 3\]",
        ),
        (LOSS.replace("torch.zeros_like(inputs.loss_mask)", "None"), "returned a NoneType as flags of bounded tokens"),
        (
            LOSS.replace("torch.zeros_like(inputs.loss_mask)", "ratio"),
            r"flags of bounded tokens of torch.float32 \[2, 3\]: it must be a bool tensor",
        ),
        (LOSS.replace("-ratio *", "torch.inf * ratio *"), "returned the losses .*: they must be finite"),
        (LOSS.replace(".exp()", ".detach()"), "do not depend on the policy's logprobs"),
    ],
)
def test_an_own_surrogate_that_does_not_fit_is_refused_in_one_line(own, source, words):
    own(source)
    with pytest.raises(ConfigError, match=f'^model.loss.surrogate "my_module.my_loss" .*{words}') as caught:
        LossConfig("grpo", surrogate="my_module.my_loss")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (ADVANTAGE.replace(", over_ranks", ""), r"must take \(inputs, over_ranks\): too many"),
        (ADVANTAGE.replace("0.5)", "'a')"), "raised TypeError"),
        (ADVANTAGE.replace(", None", ""), "must return advantages per token, and None"),
        (ADVANTAGE.replace("None", "inputs.rewards"), "must return advantages per token, and None"),
        (
            ADVANTAGE.replace("inputs.per_token", ""),
            r"returned advantages of torch.float64 \[2, 4\]: it must be a float tensor of shape \[8, 3\]",
        ),
        (ADVANTAGE.replace("- 0.5", "/ 0.0"), "returned the advantages .*: they must be finite"),
    ],
)
def test_an_own_advantage_that_does_not_fit_is_refused_in_one_line(own, source, words):
    own(source)
    with pytest.raises(ConfigError, match=f'^model.loss.advantage "my_module.my_advantage" .*{words}') as caught:
        LossConfig("grpo", advantage="my_module.my_advantage")
    assert "\n" not in str(caught.value)


def test_a_module_that_does_not_exist_is_refused():
    with pytest.raises(
        ConfigError, match=r'^model.loss.advantage "no_such.thing" cannot be imported: ModuleNotFoundError'
    ):
        LossConfig("grpo", advantage="no_such.thing")


def test_the_example_has_every_reward_and_the_kl_and_draws_no_random_number(own):
    own("""
import torch

def my_advantage(inputs, over_ranks):
    assert inputs.settings.kl_weight == 0.5 and inputs.signals.kl.shape == inputs.mask.shape
    assert (inputs.turn_ends.sum(dim=1) == 1).all() and not inputs.trained.all()
    noise = torch.randn(3)
    return inputs.per_token(inputs.rewards_by_name["correct"].nan_to_num(nan=0.0)) - inputs.kl_cost, None
""")
    state = torch.random.get_rng_state()
    LossConfig("rloo", advantage="my_module.my_advantage", beta=0.5)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_result_of_the_wrong_shape_is_refused_at_a_later_call_too(own):
    own("""
def my_loss(inputs):
    rows = 2 if inputs.loss_mask.shape[0] == 2 else 1
    return -inputs.log_ratio[:rows], inputs.loss_mask[:rows]
""")
    config, three = LossConfig("grpo", surrogate="my_module.my_loss"), torch.zeros(3, 4)
    with pytest.raises(ConfigError, match=r"losses of torch.float32 \[1, 4\]"):
        config.surrogate_spec.function(SurrogateInputs(three, three, three, three.bool(), config.surrogate_settings))
