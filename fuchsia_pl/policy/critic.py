"""The critic of `advantage: gae`."""

import torch
from torch import Tensor, nn

CRITIC_WIDTH = 256


class Critic(nn.Module):
    """A small head of its own on the policy's last hidden states: value = W2 tanh(W1 h + b1) + b2, in float32.

    The hidden states are detached. So the critic costs no second forward and no second model, and no gradient of its loss, whose
    scale has nothing to do with the policy's, reaches the policy's weights; clipping by norm still sees both gradients. The
    price is that it can only say what the policy's features show. It learns at the optimizer's one learning rate.
    W2 starts at 0: before it has learned anything every value is 0, and the advantages are the returns.

    Args:
        hidden_size: Width of the hidden states.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, CRITIC_WIDTH)
        self.outer = nn.Linear(CRITIC_WIDTH, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values float32 [N] of hidden states [N, H]; gradient reaches the critic's own weights only."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.outer(torch.tanh(self.inner(hidden.detach().float()))).squeeze(1)
