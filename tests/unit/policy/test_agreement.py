import pytest
import torch

from fuchsia_pl.policy.agreement import adapter_agreement

REFERENCE = torch.tensor([-1.0, -2.0, -3.0])
EFFECT = torch.tensor([0.1, -0.2, 0.2])


@pytest.mark.parametrize("applied", [0.0, 1.0, 2.0])
def test_the_slope_is_the_share_that_the_engine_applies(applied):
    effect, reference = EFFECT.repeat(8), REFERENCE.repeat(8)
    agreement = adapter_agreement(reference + effect, reference, reference + applied * effect)
    # sum x^2 = 0.09 and sum x^4 = 0.0033 in each of eight times three tokens: 8 x 0.0081 / 0.0033
    assert agreement.num_effective == pytest.approx(19.6364, abs=1e-3)
    assert agreement.slope == pytest.approx(applied, abs=1e-6)
    assert agreement.is_conclusive
    assert agreement.holds == (applied == 1.0)


def test_error_by_hand():
    # sum x^2 = 0.01 + 0.04 + 0.04 = 0.09; noise (0.2, 0.1, 0) gives sum x y = 0.09 + 0.02 - 0.02 = 0.09, slope 1;
    # residual mean (0.04 + 0.01 + 0) / 3 = 0.0166667; error sqrt(0.0166667 / 0.09) = 0.43033148;
    # mean x^2 = 0.03, y = (0.3, -0.1, 0.2), mean y^2 = 0.0466667; noise sqrt(0.0166667 / 0.0466667) = 0.59761430
    sampled = REFERENCE + EFFECT + torch.tensor([0.2, 0.1, 0.0])
    agreement = adapter_agreement(REFERENCE + EFFECT, REFERENCE, sampled)
    assert agreement.slope == pytest.approx(1.0, abs=1e-6)
    assert agreement.error == pytest.approx(0.43033148, abs=1e-5)
    assert agreement.noise == pytest.approx(0.59761430, abs=1e-5)
    assert not agreement.is_conclusive


def test_an_effect_on_a_few_tokens_says_nothing_however_clear_it_is():
    """Measured with 85 tokens of two steps at a small learning rate: the slope was 0.41, two steps later 1.75."""
    effect = torch.zeros(85)
    effect[:3] = torch.tensor([0.5, -0.3, 0.2])
    agreement = adapter_agreement(effect, torch.zeros(85), 1.75 * effect)
    assert agreement.error < 0.01 > agreement.noise
    assert not agreement.is_conclusive


def test_an_adapter_without_effect_says_nothing():
    assert not adapter_agreement(REFERENCE, REFERENCE, REFERENCE + EFFECT).is_conclusive


@pytest.mark.parametrize("applied", [0.0, 1.0])
def test_rounding_alone_is_never_taken_for_a_finding_however_many_tokens_there_are(applied):
    """The adapter's effect is a tenth of the rounding of each of the three logprobs, as after a first small step."""
    generator = torch.Generator().manual_seed(0)
    effect, *rounding = (torch.randn(20_000, generator=generator) for _ in range(4))
    policy, reference, sampled = (0.04 * noise for noise in rounding)
    agreement = adapter_agreement(0.004 * effect + policy, reference, applied * 0.004 * effect + sampled)
    assert agreement.error < 0.01
    assert 0.4 < agreement.slope < 0.6
    assert not agreement.is_conclusive


@pytest.mark.parametrize("applied", [0.0, 1.0])
def test_an_effect_above_the_rounding_is_told_from_none(applied):
    generator = torch.Generator().manual_seed(0)
    effect, *rounding = (torch.randn(500, generator=generator) for _ in range(4))
    policy, reference, sampled = (0.04 * noise for noise in rounding)
    agreement = adapter_agreement(0.2 * effect + policy, reference, applied * 0.2 * effect + sampled)
    assert agreement.is_conclusive
    assert agreement.holds == (applied == 1.0)


def test_only_what_is_not_rounding_asks_for_more_tokens():
    few = adapter_agreement(EFFECT, torch.zeros(3), EFFECT)  # exact, on three tokens
    assert few.lacks_tokens
    assert not few.is_conclusive
    assert not adapter_agreement(EFFECT.repeat(8), torch.zeros(24), EFFECT.repeat(8)).lacks_tokens  # conclusive
    assert not adapter_agreement(EFFECT, torch.zeros(3), torch.tensor([0.2, 0.1, 0.2])).lacks_tokens  # noise
    assert not adapter_agreement(REFERENCE, REFERENCE, REFERENCE).lacks_tokens  # no effect
