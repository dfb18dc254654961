"""From the rewards of a group's siblings to their advantages."""

import torch
from torch import Tensor

SPREAD_TOLERANCE = 1e-6
STD_EPSILON = 1e-4


def has_spread(rewards: Tensor) -> Tensor:
    """Says which groups have siblings with different rewards.

    Equal sums of floats can differ in their last digits (0.1 + 0.2 and 0.3), so a range within `SPREAD_TOLERANCE` of the
    largest magnitude counts as none.

    Args:
        rewards: Total rewards [N, G], one row per group.

    Returns:
        bool [N].
    """
    scale = rewards.abs().amax(dim=1).clamp(min=1.0)
    return rewards.amax(dim=1) - rewards.amin(dim=1) > SPREAD_TOLERANCE * scale


def group_advantages(rewards: Tensor) -> Tensor:
    """Group-normalised advantages: A_i = (r_i - mean(r)) / (std(r) + 1e-4), 0 for a group without spread.

    std is the unbiased estimate (divided by G - 1). Source: DeepSeekMath, arXiv:2402.03300, section 4.1.2.

    Args:
        rewards: Total rewards [N, G], one row per group.

    Returns:
        float64 [N, G]; each row sums to 0.

    Raises:
        ValueError: A group has fewer than two siblings.

    >>> group_advantages(torch.tensor([[0.0, 1.0], [3.0, 3.0]])).round(decimals=3)
    tensor([[-0.7070,  0.7070],
            [ 0.0000,  0.0000]], dtype=torch.float64)
    """
    if rewards.shape[1] < 2:
        raise ValueError(
            f"a group needs at least 2 siblings to compare, got {rewards.shape[1]}: set data.sampling.group_size to 2 or more"
        )
    rewards = rewards.double()
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    advantages = centred / (rewards.std(dim=1, keepdim=True) + STD_EPSILON)
    return torch.where(has_spread(rewards).unsqueeze(1), advantages, torch.zeros_like(advantages))
