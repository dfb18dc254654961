"""Sizes of the memory plan: micro-batches, weights, and what a micro-batch needs beside them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fuchsia_pl.batch import Batch, PrefixGroup
from fuchsia_pl.policy.checkpointing import transformer_blocks
from fuchsia_pl.policy.critic import Critic
from fuchsia_pl.policy.logprobs import OutputHead, fastest_chunk_tokens
from fuchsia_pl.policy.policy import Policy, output_head

FLOAT_BYTES = 4
# 4 bits, and 0.127 for the quantized scales (QLoRA, arXiv:2305.14314, section 3, "Double Quantization").
NF4_BYTES = 4.127 / 8


@dataclass(frozen=True)
class MicroBatch:
    """Sizes of a micro-batch.

    Attributes:
        lengths: Inputs of each row.
        groups: Adjacent rows that share a prefix.
        num_sampled: Tokens whose logprobs are computed.
        shares_prefix: Whether the prefix of a group is computed once.

    >>> MicroBatch((63, 49), (PrefixGroup(2, 40),), num_sampled=34, shares_prefix=True).num_tokens
    72
    >>> MicroBatch((63, 49), (PrefixGroup(2, 40),), num_sampled=34, shares_prefix=False).num_tokens  # both padded to 63
    126
    """

    lengths: tuple[int, ...]
    groups: tuple[PrefixGroup, ...]
    num_sampled: int
    shares_prefix: bool

    @classmethod
    def of(cls, batch: Batch, shares_prefix: bool) -> "MicroBatch":
        """The sizes of a batch."""
        return cls(batch.lengths, batch.groups, int(batch.loss_mask.sum()), shares_prefix)

    @property
    def num_tokens(self) -> int:
        """Tokens of the forward, with padding."""
        if not self.shares_prefix:
            return len(self.lengths) * max(self.lengths)
        return sum(self.lengths) - sum((group.num_rows - 1) * group.prefix_length for group in self.groups)


@dataclass(frozen=True)
class Weights:
    """Sizes of a policy's weights, over all ranks.

    Attributes:
        frozen: Bytes of the frozen weights, with those of a reference that is a copy.
        num_trained: Number of trained weights, with those of a critic.
        num_critic: Number of weights of the critic.
        num_served: Number of weights of the model without adapter.
        block: Bytes of the largest transformer block.
        outside: Bytes of the weights outside of blocks: embeddings, norm, output head, critic.
    """

    frozen: int
    num_trained: int
    num_critic: int
    num_served: int
    block: int
    outside: int


@dataclass(frozen=True)
class Activations:
    """Bytes that a micro-batch needs beside weights, gradients and optimizer.

    Attributes:
        kept: Tensors that autograd saves for backward on the device.
        logits: Buffers of the logits of a chunk.
        transients: What the peak has beyond these: a recomputed block, gradients of activations.
        on_host: Tensors that autograd saves in host memory.
    """

    kept: int = 0
    logits: int = 0
    transients: int = 0
    on_host: int = 0


def weights_of(policy: Policy) -> Weights:
    """Sizes of the weights of a loaded policy."""
    copied = sum(weight.nbytes for weight in policy.reference_weights())
    weights = weights_in(policy.causal_lm, policy.model, policy.critic, 0, are_packed=False)
    return replace(weights, frozen=weights.frozen + copied)


def weights_in(
    base: PreTrainedModel, model: nn.Module, critic: Critic | None, copy_itemsize: int, are_packed: bool
) -> Weights:
    """Sizes of weights.

    Args:
        base: The model of transformers, with the adapter's layers inside it.
        model: The same, or what wraps it.
        critic: The critic, if there is one.
        copy_itemsize: Bytes of a weight of a reference that is a copy; 0 without one.
        are_packed: Whether the linear layers of blocks will be held in 4 bits.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    is_adapted = any(not p.requires_grad for p in model.parameters())
    num_served = base.num_parameters() - (trained if is_adapted else 0)
    within = [_held_bytes(block, are_packed) for block in transformer_blocks(base)]
    held, of_critic = _held_bytes(model, are_packed), sum(p.numel() for p in critic.parameters()) if critic else 0
    return Weights(
        frozen=held - FLOAT_BYTES * trained + copy_itemsize * num_served,
        num_trained=trained + of_critic,
        num_critic=of_critic,
        num_served=num_served,
        block=max(within, default=0),
        outside=held - sum(within) + FLOAT_BYTES * of_critic,
    )


def _held_bytes(module: nn.Module, are_packed: bool) -> int:
    """Bytes of a module's weights. In 4 bits are the linear layers of blocks, without their adapters; all others stay."""
    packed: set[Tensor] = set()
    if are_packed:
        blocks = [child for child in module.modules() if isinstance(child, GradientCheckpointingLayer)]
        linear = [child for block in blocks for child in block.modules() if isinstance(child, nn.Linear)]
        packed = {layer.weight for layer in linear if not layer.weight.requires_grad}
    return sum(int(p.numel() * NF4_BYTES) if p in packed else p.nbytes for p in module.parameters())


def logits_bytes(policy: Policy, num_sampled: int) -> int:
    """Bytes of the buffers of a chunk of logits of a loaded policy, outside of autocast."""
    head = output_head(policy.causal_lm)
    rows = min(policy.config.logprob_chunk_tokens or fastest_chunk_tokens(head), num_sampled)
    return buffer_bytes(head, rows, head.weight.shape[0], head.weight.dtype)


def buffer_bytes(head: OutputHead, num_rows: int, vocabulary: int, product: torch.dtype) -> int:
    """The product in its type; logits, logprobs and the slope of a cap in float32."""
    return num_rows * vocabulary * (product.itemsize + FLOAT_BYTES * (2 if head.softcap is None else 3))
