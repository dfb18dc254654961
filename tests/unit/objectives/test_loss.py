from dataclasses import replace

import pytest
import torch

from fuchsia_pl.objectives.loss import LossConfig, logprob_gap, policy_loss
from fuchsia_pl.rollouts.batcher import make_batches
from fuchsia_pl.types import Batch
from tests.doubles import denominators, make_sample


def make_batch(rows, num_tokens: int, num_rows: int) -> Batch:
    samples = [make_sample([1, 2], list(range(3, 3 + length)), advantage) for length, advantage in rows]
    return make_batches(samples, 1, denominators(num_tokens, num_rows), policy_version=0, metrics={})[0]


def loss_and_gradient(config: LossConfig, batch: Batch, policy, reference=None):
    policy = policy.clone().requires_grad_()
    output = policy_loss(config, batch, policy, reference)
    output.loss.backward()
    return output, policy.grad


# Two rows of 3 and 1 sampled tokens with advantages 1.5 and -0.5; positions 1, 2, 3 and 1 carry them.
BATCH = make_batch([(3, 1.5), (1, -0.5)], num_tokens=4, num_rows=2)
POLICY = torch.full((2, 4), -1.0)


def test_first_update_by_hand_is_reinforce():
    # Ratio 1, so each token's loss is -A and its gradient -A / 4 tokens:
    # loss (3 * -1.5 + 0.5) / 4 = -1; gradients -0.375 in row 0, +0.125 in row 1
    output, gradient = loss_and_gradient(LossConfig(), BATCH, POLICY)
    assert output.loss.item() == pytest.approx(-1.0)
    expected = torch.tensor([[0.0, -0.375, -0.375, -0.375], [0.0, 0.125, 0.0, 0.0]])
    torch.testing.assert_close(gradient, expected)
    assert output.metrics["train/clip_fraction"].item() == 0.0


@pytest.mark.parametrize(
    ("reduction", "expected"), [("token_mean", -1.0), ("sequence_mean", -0.5), ("constant", -0.25)]
)
def test_prompt_and_padding_count_for_nothing(reduction, expected):
    # The rows of BATCH after a prompt of 6: 5 and 7 masked positions, whose losses of -1.5 and 0.5 would add -4 to the sum.
    samples = [make_sample([1] * 6, [3, 4, 5], 1.5), make_sample([1] * 6, [3], -0.5)]
    batch = make_batches(samples, 1, denominators(num_tokens=4, num_rows=2), 0, {})[0]
    output, _ = loss_and_gradient(LossConfig(reduction=reduction), batch, torch.full((2, 8), -1.0))
    assert output.loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("old_logprobs", ["trainer", "sampler"])
def test_masked_tokens_get_exactly_zero_gradient_even_where_they_are_not_numbers(estimator, old_logprobs):
    policy = torch.where(BATCH.loss_mask, POLICY, float("nan"))
    config = LossConfig(beta=0.1, kl_estimator=estimator, old_logprobs=old_logprobs)
    output, gradient = loss_and_gradient(config, BATCH, policy, policy - 0.1)
    assert output.loss.isfinite()
    assert (gradient[~BATCH.loss_mask] == 0.0).all()


def test_ratio_to_the_sampler_by_hand():
    # The sampler had -1.0 everywhere. Row 0: logp -0.5, ratio e^0.5 = 1.6487 above 1.28: loss -1.28 * 1.5 = -1.92, no gradient.
    # Row 1: logp -1.5, ratio e^-0.5 = 0.6065 below 0.8 with A < 0: loss 0.8 * 0.5 = 0.4, no gradient.
    policy = torch.tensor([[0.0, -0.5, -0.5, -0.5], [0.0, -1.5, 0.0, 0.0]])
    output, gradient = loss_and_gradient(LossConfig(old_logprobs="sampler"), BATCH, policy)
    assert output.loss.item() == pytest.approx((3 * -1.92 + 0.4) / 4)
    assert (gradient == 0).all()
    assert output.metrics["train/clip_fraction"].item() == 1.0


def test_the_gap_by_hand():
    # |-0.5 + 1| on three tokens and |-2 + 1| on one, over 4 tokens; what the mask hides counts for nothing
    policy = torch.tensor([[9.0, -0.5, -0.5, -0.5], [9.0, -2.0, 9.0, 9.0]], requires_grad=True)
    gap = logprob_gap(BATCH, policy)
    assert gap.item() == pytest.approx(0.625)
    assert not gap.requires_grad


def test_kl_by_hand():
    # ref 0.1 above: d = 0.1, k3 = e^0.1 - 1 - 0.1 = 0.00517092 on each token; k1 = -0.1; k2 = 0.005
    reference = POLICY + 0.1
    for estimator, value in {"k1": -0.1, "k2": 0.005, "k3": 0.00517092}.items():
        output, _ = loss_and_gradient(LossConfig(beta=2.0, kl_estimator=estimator), BATCH, POLICY, reference)
        assert output.metrics["train/kl"].item() == pytest.approx(value, abs=1e-7)
        assert output.loss.item() == pytest.approx(-1.0 + 2.0 * value, abs=1e-6)


def test_the_kl_pulls_towards_the_reference():
    batch = replace(BATCH, advantages=torch.zeros(2))
    _, gradient = loss_and_gradient(LossConfig(beta=1.0), batch, POLICY, POLICY + 0.5)
    assert (gradient[batch.loss_mask] < 0).all()  # descending raises logprobs that lie below the reference's


def test_reductions_by_hand():
    # token losses -1.5 three times and 0.5 once: sequence mean (-1.5 + 0.5) / 2, constant (-4.5 + 0.5) / (2 * 8)
    assert loss_and_gradient(LossConfig(reduction="sequence_mean"), BATCH, POLICY)[0].loss.item() == pytest.approx(-0.5)
    assert loss_and_gradient(LossConfig(reduction="constant"), BATCH, POLICY)[0].loss.item() == pytest.approx(-0.25)


@pytest.mark.parametrize(
    "change",
    [
        {"clip_low": 0.5},
        {"clip_high": 0.9},
        {"old_logprobs": "trainer"},
        {"beta": 0.5},
        {"kl_estimator": "k1"},
        {"reduction": "sequence_mean"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_changes_the_loss(change):
    config = LossConfig(old_logprobs="sampler", beta=0.1)
    policy = torch.tensor([[0.0, -0.5, -0.4, -1.2], [0.0, -1.5, 0.0, 0.0]])
    before = policy_loss(config, BATCH, policy, POLICY).loss
    after = policy_loss(replace(config, **change), BATCH, policy, POLICY).loss
    assert before.item() != pytest.approx(after.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"clip_low": 0.0}, "clip_low must be above 0 and at most 1, got 0"),
        ({"clip_low": 1.5}, "clip_low must be above 0 and at most 1, got 1.5"),
        ({"clip_high": 0.0}, "clip_high must be above 0, got 0"),
        ({"beta": -0.1}, "beta must be 0 or more, got -0.1"),
    ],
)
def test_settings_that_turn_the_objective_around_are_refused(setting, words):
    with pytest.raises(ValueError, match=words):
        LossConfig(**setting)
