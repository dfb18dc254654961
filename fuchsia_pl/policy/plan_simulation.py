"""Forward and backward of a micro-batch on tensors without memory: what is kept for backward, and the peak.

The model of transformers with its adapter, the attention of this project and the output head in chunks run on fake tensors,
which have shapes, types and lifetimes but no values. So a change of any of them changes the plan too.
"""

import copy
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fuchsia_pl.batch import Batch, PrefixGroup
from fuchsia_pl.policy.adapter import add_adapter
from fuchsia_pl.policy.checkpointing import checkpoint_blocks, transformer_blocks
from fuchsia_pl.policy.config import PolicyConfig
from fuchsia_pl.policy.critic import CRITIC_WIDTH, Critic
from fuchsia_pl.policy.logprobs import (
    CPU_CHUNK_BYTES,
    DEVICE_CHUNK_BYTES,
    OutputHead,
    chunked_logprobs,
    fastest_chunk_tokens,
)
from fuchsia_pl.policy.memory import KeptBytes
from fuchsia_pl.policy.policy import Policy, output_head
from fuchsia_pl.policy.prefix_layout import lay_out
from fuchsia_pl.policy.shared_prefix import ATTENTION_NAME, shared_prefix_attention
from fuchsia_pl.types import ConfigError

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


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are created inside a `with` block, at their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and adds the storages of its results."""
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, result)
        return result

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leaves tensors out of the count that exist already."""
        for tensor in tensors:
            self._seen[tensor.untyped_storage()] = 0

    def _add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            size = self._seen[storage] = storage.nbytes()
            weakref.finalize(storage, self._free, size)
            self.num_bytes += size
            self.peak = max(self.peak, self.num_bytes)
        return tensor

    def _free(self, size: int) -> None:
        self.num_bytes -= size


class Simulator:
    """Builds a model on fake tensors and runs micro-batches forward and backward. Results are kept.

    Args:
        architecture: The model.
        autocast: Type that autocast chooses for products, None without autocast.
        with_reference: Whether the reference is needed. Without an adapter it is a copy of the model.
        with_critic: Whether a critic is trained.
        is_gpu: Whether the logits are computed in chunks of the size for a GPU.
    """

    def __init__(
        self,
        architecture: PretrainedConfig,
        autocast: torch.dtype | None = None,
        with_reference: bool = False,
        with_critic: bool = False,
        is_gpu: bool = True,
    ) -> None:
        self.architecture = architecture
        self.autocast = autocast
        self.with_reference = with_reference
        self.with_critic = with_critic
        self.is_gpu = is_gpu
        self._found: dict[tuple[str, MicroBatch], tuple[Weights, Activations]] = {}

    def run(self, policy: PolicyConfig, micro_batch: MicroBatch) -> tuple[Weights, Activations]:
        """Sizes of the weights, and what a micro-batch needs beside them.

        Raises:
            ConfigError: The model needs values, which fake tensors do not have, or transformers does not support it.
        """
        key = (repr(policy), micro_batch)
        if key not in self._found:
            try:
                self._found[key] = self._simulated(policy, micro_batch)
            except ConfigError:
                raise
            except Exception as error:  # a model's own code meets tensors without values
                kind = self.architecture.model_type
                raise ConfigError(
                    f"the memory of a model of type {kind!r} cannot be planned ({type(error).__name__}: "
                    f"{' '.join(str(error).split())[:200]}). The rehearsal at the start of `fuchsia fit` measures it"
                ) from error
        return self._found[key]

    def _simulated(self, policy: PolicyConfig, micro_batch: MicroBatch) -> tuple[Weights, Activations]:
        inputs = _inputs(micro_batch)  # before the mode: a layout is computed from values
        with FakeTensorMode() as mode:
            base = _fake_model(self.architecture, policy)
            model: nn.Module = add_adapter(base, policy) if policy.lora.enabled else base
            if policy.checkpointing.enabled:
                checkpoint_blocks(base, policy.checkpointing.every_n_layers)
            for module in model.modules():
                if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                    module.cast_input_dtype_enabled = self.autocast is None
            copy_bytes = getattr(torch, policy.dtype).itemsize if self.with_reference and not policy.lora.enabled else 0
            critic = Critic(base.config.get_text_config().hidden_size) if self.with_critic else None
            weights = _weights(base, model, critic, copy_bytes, policy.quantization is not None)
            return weights, self._activations(base, model, policy, micro_batch, _fake(mode, inputs))

    def _activations(
        self,
        base: PreTrainedModel,
        model: nn.Module,
        policy: PolicyConfig,
        micro_batch: MicroBatch,
        inputs: dict[str, Any],
    ) -> Activations:
        head = output_head(base)
        rows = self._chunk_tokens(policy, head.weight.shape[0], micro_batch.num_sampled)
        logits = _buffer_bytes(head, rows, self.autocast or head.weight.dtype)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)  # gradients count as part of the trained weights
        picked = torch.zeros(micro_batch.num_sampled, dtype=torch.int64)
        labels, temperatures = torch.zeros_like(picked), torch.ones(micro_batch.num_sampled)
        peak, kept = PeakBytes(), KeptBytes(model)
        peak.ignore(
            [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        )
        autocast = nullcontext() if self.autocast is None else torch.autocast("cpu", dtype=self.autocast)
        with peak:
            with kept, autocast:
                hidden = base.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[picked]
                logprobs, entropies = chunked_logprobs(head, hidden, labels, temperatures, rows)
            (logprobs.sum() + entropies.sum()).backward()
        of_critic = (
            FLOAT_BYTES * micro_batch.num_sampled * (hidden.shape[1] + 2 * CRITIC_WIDTH) if self.with_critic else 0
        )
        transients = max(peak.peak - kept.num_bytes - logits, 0)
        if policy.checkpointing.cpu_offloading:
            return Activations(of_critic, logits, transients, on_host=kept.num_bytes)
        return Activations(kept.num_bytes + of_critic, logits, transients)

    def _chunk_tokens(self, policy: PolicyConfig, vocabulary: int, num_sampled: int) -> int:
        budget = DEVICE_CHUNK_BYTES if self.is_gpu else CPU_CHUNK_BYTES
        return min(policy.logprob_chunk_tokens or max(budget // (FLOAT_BYTES * vocabulary), 1), num_sampled)


def _fake_model(architecture: PretrainedConfig, policy: PolicyConfig) -> PreTrainedModel:
    dtype = getattr(torch, policy.dtype) if policy.lora.enabled else torch.float32
    model = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
    if policy.shared_prefix != "never":
        AttentionInterface.register(ATTENTION_NAME, shared_prefix_attention)
        model.set_attn_implementation(ATTENTION_NAME)
    return model.train()


def weights_of(policy: Policy) -> Weights:
    """Sizes of the weights of a loaded policy."""
    copied = sum(weight.nbytes for weight in policy.reference_weights())
    weights = _weights(policy.causal_lm, policy.model, policy.critic, 0, are_packed=False)
    return replace(weights, frozen=weights.frozen + copied)


def _weights(
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
    packed: set[nn.Parameter] = set()
    if are_packed:
        blocks = [child for child in module.modules() if isinstance(child, GradientCheckpointingLayer)]
        linear = [child for block in blocks for child in block.modules() if isinstance(child, nn.Linear)]
        packed = {layer.weight for layer in linear if not layer.weight.requires_grad}
    return sum(int(p.numel() * NF4_BYTES) if p in packed else p.nbytes for p in module.parameters())


def logits_bytes(policy: Policy, num_sampled: int) -> int:
    """Bytes of the buffers of a chunk of logits of a loaded policy, outside of autocast."""
    head = output_head(policy.causal_lm)
    rows = min(policy.config.logprob_chunk_tokens or fastest_chunk_tokens(head), num_sampled)
    return _buffer_bytes(head, rows, head.weight.dtype)


def _buffer_bytes(head: OutputHead, num_rows: int, product: torch.dtype) -> int:
    """The product in its type; logits, logprobs and the slope of a cap in float32."""
    return num_rows * head.weight.shape[0] * (product.itemsize + FLOAT_BYTES * (2 if head.softcap is None else 3))


def _inputs(micro_batch: MicroBatch) -> dict[str, Any]:
    """Arguments of the model, with ids that are all the same."""
    ids = torch.ones(len(micro_batch.lengths), max(micro_batch.lengths), dtype=torch.int64)
    if not micro_batch.shares_prefix:
        return {"input_ids": ids}
    layout = lay_out(ids, micro_batch.lengths, micro_batch.groups)
    _ = layout.padded  # computed from values
    return {"input_ids": layout.input_ids, "position_ids": layout.position_ids, "shared_prefix": layout}


def _fake(mode: FakeTensorMode, value: Any) -> Any:
    """The same with fake tensors in place of tensors, also inside containers, dataclasses and their cached properties."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if isinstance(value, dict):
        return {key: _fake(mode, each) for key, each in value.items()}
    if not is_dataclass(value) or isinstance(value, type):
        return value
    twin = copy.copy(value)
    vars(twin).update(_fake(mode, vars(value)))
    return twin
