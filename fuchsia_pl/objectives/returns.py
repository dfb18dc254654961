"""Advantages per token: returns of rewards along a rollout, GAE, and the critic's loss.

Shape letters: B rows, T positions.
"""

import torch
from torch import Tensor


def rewards_to_go(rewards: Tensor, loss_mask: Tensor) -> Tensor:
    """R_t = sum of the rewards at sampled positions from t on.

    Args:
        rewards: [B, T]; positions with the mask False may hold anything.
        loss_mask: bool [B, T], True where the policy sampled the token.

    Returns:
        [B, T], 0 where the mask is False.

    >>> rewards_to_go(torch.tensor([[-0.5, 9.0, 1.0]]), torch.tensor([[True, False, True]]))
    tensor([[0.5000, 0.0000, 1.0000]])
    """
    kept = torch.where(loss_mask, rewards, 0.0)
    return torch.where(loss_mask, kept.flip(1).cumsum(dim=1).flip(1), 0.0)


def gae(rewards: Tensor, values: Tensor, loss_mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation over the sampled tokens; tokens of the environment are skipped.

    d_t = r_t + gamma V_t' - V_t and A_t = d_t + gamma lam A_t', where t' is the next sampled position, and V = A = 0 after
    the last. Source: GAE, arXiv:1506.02438, section 3.

    Args:
        rewards: [B, T].
        values: [B, T], the critic's value of the state in which each token was sampled.
        loss_mask: bool [B, T], True where the policy sampled the token.
        gamma: Discount.
        lam: 0 is the one-step error, 1 the return less the value.

    Returns:
        [B, T], 0 where the mask is False. A_t + V_t is the critic's target.

    >>> gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.8]]), torch.tensor([[True, True]]), gamma=1.0, lam=1.0)
    tensor([[0.5000, 0.2000]])
    """
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(next_value)
    for t in range(values.shape[1] - 1, -1, -1):
        sampled = loss_mask[:, t]
        error = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = error + gamma * lam * next_advantage
        next_value = torch.where(sampled, values[:, t], next_value)
        next_advantage = torch.where(sampled, advantage, next_advantage)
        advantages[:, t] = torch.where(sampled, advantage, 0.0)
    return advantages


def value_loss(values: Tensor, old_values: Tensor, targets: Tensor, clip: float) -> Tensor:
    """max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / 2 per token.

    The larger of the two has no gradient once V has moved by c towards its target. Source: the value clipping of
    PPO's reference implementation, as described in "Implementation Matters", arXiv:2005.12729, section 3.

    Args:
        values: [B, T], gradient flows through them.
        old_values: [B, T], the critic's values before the update.
        targets: [B, T], R.
        clip: c.

    >>> value_loss(torch.tensor([0.5]), torch.tensor([0.0]), torch.tensor([1.0]), clip=0.2)
    tensor([0.3200])
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - targets).square(), (near - targets).square())
