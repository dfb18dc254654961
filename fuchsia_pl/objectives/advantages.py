"""Rewards of siblings -> advantages.

Shape letters: N groups, G siblings of a group, M numbers of any kind. A NaN reward was not scored: it is left out of
its group's mean and spread, and its advantage is 0.
"""

import torch
from torch import Tensor

SPREAD_TOLERANCE = 1e-6
STD_EPSILON = 1e-4


def has_spread(rewards: Tensor) -> Tensor:
    """Whether the scored siblings of each group have different rewards.

    Equal sums of floats can differ in their last digits (0.1 + 0.2 and 0.3), so a range within `SPREAD_TOLERANCE` of the
    largest magnitude counts as no spread.

    Args:
        rewards: Total rewards [N, G], one row per group.

    Returns:
        bool [N].
    """
    scored = ~rewards.isnan()
    scale = rewards.abs().nan_to_num(nan=0.0).amax(dim=1).clamp(min=1.0)
    highest = torch.where(scored, rewards, -torch.inf).amax(dim=1)
    lowest = torch.where(scored, rewards, torch.inf).amin(dim=1)
    return highest - lowest > SPREAD_TOLERANCE * scale


def group_mean_advantages(rewards: Tensor) -> Tensor:
    """A_i = r_i - mean(r), without a division by the spread. Source: Dr.GRPO, arXiv:2503.20783, section 3.2.

    Args:
        rewards: Total rewards [N, G].

    Returns:
        float64 [N, G]; each row sums to 0.

    Raises:
        ValueError: A group has fewer than two siblings.

    >>> group_mean_advantages(torch.tensor([[0.0, 1.0], [3.0, float("nan")]]))
    tensor([[-0.5000,  0.5000],
            [ 0.0000,  0.0000]], dtype=torch.float64)
    """
    rewards = _checked(rewards)
    return _where_spread(rewards, rewards - rewards.nanmean(dim=1, keepdim=True))


def group_norm_advantages(rewards: Tensor) -> Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + 1e-4), 0 for a group without spread.

    std is the unbiased estimate (divided by the number of scored siblings less 1). Source: DeepSeekMath, arXiv:2402.03300,
    section 4.1.2.

    Args:
        rewards: Total rewards [N, G].

    Returns:
        float64 [N, G]; each row sums to 0.

    Raises:
        ValueError: A group has fewer than two siblings.

    >>> group_norm_advantages(torch.tensor([[0.0, 1.0], [3.0, 3.0]])).round(decimals=3)
    tensor([[-0.7070,  0.7070],
            [ 0.0000,  0.0000]], dtype=torch.float64)
    """
    rewards = _checked(rewards)
    centred = rewards - rewards.nanmean(dim=1, keepdim=True)
    num_scored = (~rewards.isnan()).sum(dim=1, keepdim=True)
    std = (centred.square().nansum(dim=1, keepdim=True) / (num_scored - 1).clamp(min=1)).sqrt()
    return _where_spread(rewards, centred / (std + STD_EPSILON))


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """A_i = r_i - mean of the other siblings' rewards. Source: RLOO, arXiv:2402.14740, section 2.2.

    Args:
        rewards: Total rewards [N, G].

    Returns:
        float64 [N, G]; each row sums to 0.

    Raises:
        ValueError: A group has fewer than two siblings.

    >>> leave_one_out_advantages(torch.tensor([[1.0, 0.0, 0.5]]))
    tensor([[ 0.7500, -0.7500,  0.0000]], dtype=torch.float64)
    """
    rewards = _checked(rewards)
    num_others = (~rewards.isnan()).sum(dim=1, keepdim=True) - 1
    baseline = (rewards.nansum(dim=1, keepdim=True) - rewards) / num_others.clamp(min=1)
    return _where_spread(rewards, rewards - baseline)


def moments(values: Tensor) -> Tensor:
    """Count, sum and sum of squares, which can be summed over ranks.

    Args:
        values: [M].

    Returns:
        float64 [3].

    >>> moments(torch.tensor([1.0, 3.0]))
    tensor([ 2.,  4., 10.], dtype=torch.float64)
    """
    values = values.double()
    return torch.stack([torch.tensor(float(values.numel()), dtype=torch.float64), values.sum(), values.square().sum()])


def batch_norm_advantages(values: Tensor, batch_moments: Tensor) -> Tensor:
    """(v - mean) / (std + 1e-4) with mean and unbiased std of the whole step. Source: REINFORCE++, arXiv:2501.03262.

    Args:
        values: [M], one value per sampled token.
        batch_moments: `moments` of all values of the step, over all ranks.

    Returns:
        float64 [M]; 0 where the step has no spread.

    >>> batch_norm_advantages(torch.tensor([1.0, 3.0]), moments(torch.tensor([1.0, 3.0]))).round(decimals=3)
    tensor([-0.7070,  0.7070], dtype=torch.float64)
    """
    count, total, squares = batch_moments
    mean = total / count.clamp(min=1.0)
    variance = (squares - count * mean.square()).clamp(min=0.0) / (count - 1).clamp(min=1.0)
    values = values.double()
    if variance.sqrt() <= SPREAD_TOLERANCE * mean.abs().clamp(min=1.0):
        return torch.zeros_like(values)
    return (values - mean) / (variance.sqrt() + STD_EPSILON)


def _checked(rewards: Tensor) -> Tensor:
    if rewards.shape[1] < 2:
        raise ValueError(
            f"a group needs at least 2 siblings to compare, got {rewards.shape[1]}: set data.sampling.group_size to 2 or more"
        )
    return rewards.double()


def _where_spread(rewards: Tensor, advantages: Tensor) -> Tensor:
    counts = has_spread(rewards).unsqueeze(1) & ~rewards.isnan()
    return torch.where(counts, advantages, torch.zeros_like(advantages))
