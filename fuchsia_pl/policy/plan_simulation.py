"""Forward and backward of a micro-batch on tensors without memory: what is kept for backward, and the peak.

The model of transformers with its adapter, the attention of this project and the output head in chunks run on fake tensors,
which have shapes, types and lifetimes but no values. So a change of any of them changes the plan too.
"""

import copy
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fuchsia_pl.policy.adapter import add_adapter
from fuchsia_pl.policy.checkpointing import checkpoint_blocks
from fuchsia_pl.policy.config import CheckpointingSettings, PolicyConfig
from fuchsia_pl.policy.critic import CRITIC_WIDTH, Critic
from fuchsia_pl.policy.logprobs import (
    CPU_CHUNK_BYTES,
    DEVICE_CHUNK_BYTES,
    OutputHead,
    chunked_logprobs,
)
from fuchsia_pl.policy.memory import KeptBytes
from fuchsia_pl.policy.plan_sizes import FLOAT_BYTES, Activations, MicroBatch, Weights, buffer_bytes, weights_in
from fuchsia_pl.policy.policy import output_head
from fuchsia_pl.policy.prefix_layout import lay_out
from fuchsia_pl.policy.shared_prefix import ATTENTION_NAME, shared_prefix_attention
from fuchsia_pl.types import ConfigError

PLAIN_ROWS = "planned_plain_rows"
# The logits are added up by hand: their chunks would take most of a simulation's time.
SMALLEST_VOCABULARY = 1


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
    """Builds a model without memory and runs micro-batches forward and backward. Results are kept.

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
        self._weights: dict[str, Weights] = {}
        self._needed: dict[tuple[str, MicroBatch], Activations] = {}

    def run(self, policy: PolicyConfig, micro_batch: MicroBatch) -> tuple[Weights, Activations]:
        """Sizes of the weights, and what a micro-batch needs beside them.

        Raises:
            ConfigError: The model needs values, which fake tensors do not have, or transformers does not support it.
        """
        try:
            return self._sizes(policy), self._needs(policy, micro_batch)
        except ConfigError:
            raise
        except Exception as error:  # a model's own code meets tensors without values
            raise ConfigError(
                f"the memory of a model of type {self.architecture.model_type!r} cannot be planned ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}). The rehearsal at the start of `fuchsia fit` measures it"
            ) from error

    def _sizes(self, policy: PolicyConfig) -> Weights:
        key = repr((policy.lora, policy.dtype, policy.quantization))
        if key not in self._weights:
            base = _blank_base(self.architecture, policy)
            model: nn.Module = add_adapter(base, policy) if policy.lora.enabled else base
            copy_itemsize = (
                getattr(torch, policy.dtype).itemsize if self.with_reference and not policy.lora.enabled else 0
            )
            critic = Critic(base.config.get_text_config().hidden_size) if self.with_critic else None
            self._weights[key] = weights_in(base, model, critic, copy_itemsize, policy.quantization is not None)
        return self._weights[key]

    def _needs(self, policy: PolicyConfig, micro_batch: MicroBatch) -> Activations:
        """What a micro-batch needs. A deep model is simulated at two depths, since each period of its layers needs the same."""
        key = (repr(policy), micro_batch)
        if key not in self._needed:
            depth, period = num_layers(self.architecture), _period(self.architecture, policy.checkpointing)
            first = period + depth % period
            found = self._simulated(min(first, depth), policy, micro_batch)
            if first + period < depth:
                deeper = self._simulated(first + period, policy, micro_batch)
                found = _extended(found, deeper, (depth - first) // period)
            elif first < depth:
                found = self._simulated(depth, policy, micro_batch)
            self._needed[key] = found
        return self._needed[key]

    def _simulated(self, depth: int, policy: PolicyConfig, micro_batch: MicroBatch) -> Activations:
        base = _blank_base(_shortened(self.architecture, depth), policy)
        AttentionInterface.register(ATTENTION_NAME, shared_prefix_attention)
        AttentionInterface.register(PLAIN_ROWS, _plain_rows)
        base.set_attn_implementation(ATTENTION_NAME if micro_batch.shares_prefix else PLAIN_ROWS)
        model: nn.Module = add_adapter(base, policy) if policy.lora.enabled else base
        if policy.checkpointing.enabled:
            checkpoint_blocks(base, policy.checkpointing.every_n_layers)
        for module in model.modules():
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.cast_input_dtype_enabled = self.autocast is None
            if self.is_gpu and "sliding_window" in vars(module):
                module.__dict__["sliding_window"] = None  # kernels of a GPU need no mask for it
        inputs = _inputs(micro_batch)
        with FakeTensorMode() as mode:
            _move_to_fake_memory(model)
            return self._activations(base, model, policy, micro_batch, _fake(mode, inputs))

    def _activations(
        self,
        base: PreTrainedModel,
        model: nn.Module,
        policy: PolicyConfig,
        micro_batch: MicroBatch,
        inputs: dict[str, Any],
    ) -> Activations:
        head, num_sampled = output_head(base), micro_batch.num_sampled
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)  # gradients count as part of the trained weights
        picked = torch.zeros(num_sampled, dtype=torch.int64)
        labels, temperatures = torch.zeros_like(picked), torch.ones(num_sampled)
        peak, kept = PeakBytes(), KeptBytes(model)
        peak.ignore(
            [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        )
        autocast = nullcontext() if self.autocast is None else torch.autocast("cpu", dtype=self.autocast)
        with peak:
            with kept, autocast:
                hidden = base.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[picked]
                logprobs, entropies = chunked_logprobs(head, hidden, labels, temperatures, num_sampled)
            (logprobs.sum() + entropies.sum()).backward()
        of_critic = FLOAT_BYTES * num_sampled * (hidden.shape[1] + 2 * CRITIC_WIDTH) if self.with_critic else 0
        logits = self._logits_bytes(policy, head, num_sampled)
        # Blocks run backward after the head, whose buffers are free by then.
        transients = max(peak.peak - kept.num_bytes - logits, 0)
        if policy.checkpointing.cpu_offloading:
            return Activations(of_critic, logits, transients, on_host=kept.num_bytes)
        return Activations(kept.num_bytes + of_critic, logits, transients)

    def _logits_bytes(self, policy: PolicyConfig, head: OutputHead, num_sampled: int) -> int:
        """Bytes of the output head in backward: the buffers of a chunk; if it is trained, its gradient and a copy of it."""
        text, budget = self.architecture.get_text_config(), DEVICE_CHUNK_BYTES if self.is_gpu else CPU_CHUNK_BYTES
        rows = min(policy.logprob_chunk_tokens or max(budget // (FLOAT_BYTES * text.vocab_size), 1), num_sampled)
        product = self.autocast or head.weight.dtype
        copied = product.itemsize if product != head.weight.dtype else 0
        trained = 0 if policy.lora.enabled else FLOAT_BYTES
        return buffer_bytes(head, rows, text.vocab_size, product) + text.vocab_size * text.hidden_size * (
            trained + copied
        )


def num_layers(architecture: PretrainedConfig) -> int:
    """Number of transformer blocks."""
    number: int = architecture.get_text_config().num_hidden_layers
    return number


def _period(architecture: PretrainedConfig, checkpointing: CheckpointingSettings) -> int:
    """Number of layers after which kinds of layers and checkpointing repeat; all layers if they do not."""
    depth = num_layers(architecture)
    kinds = architecture.get_text_config().to_dict().get("layer_types") or [""] * depth
    every = checkpointing.every_n_layers if checkpointing.enabled else 1
    periods = (n for n in range(every, depth, every) if all(a == b for a, b in zip(kinds, kinds[n:], strict=False)))
    return next(periods, depth)


def _shortened(architecture: PretrainedConfig, depth: int) -> PretrainedConfig:
    """The architecture with its first layers and the smallest vocabulary. Lists with an entry for each layer are cut."""
    shorter, whole = copy.deepcopy(architecture), num_layers(architecture)
    text = shorter.get_text_config()
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == whole:
            vars(text)[name] = value[:depth]
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = depth, SMALLEST_VOCABULARY, None
    return shorter


def _extended(first: Activations, second: Activations, number: int) -> Activations:
    """Activations after a number of further periods of layers, each of which adds what the first one adds."""
    values = {
        field.name: (start := getattr(first, field.name)) + number * (getattr(second, field.name) - start)
        for field in fields(Activations)
    }
    return Activations(**values)


def _blank_base(architecture: PretrainedConfig, policy: PolicyConfig) -> PreTrainedModel:
    dtype = getattr(torch, policy.dtype) if policy.lora.enabled else torch.float32
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(architecture, dtype=dtype).train()


def _plain_rows(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Attention of plain rows by the kernel that real tensors get; for tensors without memory torch chooses another one.

    Only a window that is shorter than the rows needs a mask, and with it keys and values of all heads.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    query, key, value = (states.to(dtype) for states in (query, key, value))
    length, window, mask = query.shape[2], settings.get("sliding_window"), None
    if window and length > window:
        mask = torch.zeros(1, 1, length, length, dtype=dtype)
        key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in (key, value))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, 0.0, mask is None, attn_mask=mask)[0].transpose(1, 2), None


def _move_to_fake_memory(model: nn.Module) -> None:
    """Replaces tensors on the meta device by fake ones on the CPU, where autocast and the attention kernels exist."""
    made: dict[Tensor, Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            if weight not in made:
                made[weight] = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad)
            setattr(module, name, made[weight])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


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
