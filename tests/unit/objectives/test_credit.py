"""Tensors that advantages are made of."""

import torch

from fuchsia_pl.batch import TrainerSignals
from fuchsia_pl.objectives.credit import CreditInputs, CreditSettings


def test_the_reward_is_at_the_last_token_and_an_unscored_rollout_has_none():
    rewards = torch.tensor([[0.5, float("nan")]], dtype=torch.float64)
    turn_ends = torch.tensor([[False, True, False], [True, False, False]])
    kl = torch.tensor([[0.1, 0.2, 0.0], [0.4, 0.0, 0.0]])
    inputs = CreditInputs(
        rewards,
        {},
        {},
        penalties=torch.zeros(1, 2),
        lengths=torch.tensor([2, 1]),
        turn_ends=turn_ends,
        turn_rewards=torch.zeros(2, 3, dtype=torch.float64),
        trained=torch.tensor([True, False]),
        signals=TrainerSignals(kl, None),
        settings=CreditSettings(kl_weight=0.5),
    )
    # less half of the KL: 0.5 - 0.1 at the last token of the first row, 0 - 0.2 in the second
    expected = torch.tensor([[-0.05, 0.4, 0.0], [-0.2, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(inputs.token_rewards, expected, atol=1e-7, rtol=0)
