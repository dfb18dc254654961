"""The critic of `advantage: gae`."""

import torch
from torch import Tensor, nn

CRITIC_WIDTH = 256


class Critic(nn.Module):
    """A small value head on the policy's last hidden states: value = W2 tanh(W1 h + b1) + b2, in float32.

    The hidden states are detached. The critic therefore needs no second forward and no second model, and the gradient of its
    loss does not reach the policy's weights. Clipping by norm still applies to both gradients together. The cost: the critic
    can only use features that the policy has learned. It is trained with the optimizer's one learning rate.
    W2 starts at 0: all values are 0 before the first update, and the advantages equal the returns.

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
        """Values float32 [N] of hidden states [N, H]. The gradient reaches only the critic's weights."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.outer(torch.tanh(self.inner(hidden.detach().float()))).squeeze(1)
