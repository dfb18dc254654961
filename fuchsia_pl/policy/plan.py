"""The memory plan of a rank: where the bytes of its device go, on the trainer's side and on the engine's."""

from dataclasses import dataclass
from typing import Literal

import torch

from fuchsia_pl.policy.config import PolicyConfig
from fuchsia_pl.policy.plan_sizes import FLOAT_BYTES, Activations, Weights

MIB, GIB = 2**20, 2**30
# Resident memory of a process that has imported torch and uses CUDA: 2.06 GB (github.com/pytorch/pytorch, issue 113326).
PROCESS_BYTES = 2 * GIB
Side = Literal["trainer", "engine"]
SIDES: tuple[Side, ...] = ("trainer", "engine")

# What a process holds on a GPU beside its tensors: about 300 MB since CUDA loads kernels lazily (github.com/pytorch/pytorch,
# issue 107667; vLLM logs "non_torch_memory takes 0.28GiB", github.com/vllm-project/vllm, issue 15039), and the workspaces of
# cuBLAS and NCCL.
CONTEXT_BYTES = 512 * MIB


@dataclass(frozen=True)
class PlannedEngine:
    """An engine on the trainer's device.

    Attributes:
        weights: Bytes of its weights there.
        kv_cache: Bytes for keys and values; None for what the rest leaves free.
        kv_per_token: Bytes of keys and values of a token.
        max_length: Longest prompt plus completion, in tokens.
        max_num_seqs: Requests that are decoded at the same time.
        per_request: Bytes of the sampler for each of them.
        buffers: Bytes of its activations, workspaces and buffers.
        graphs: Bytes of its CUDA graphs.
    """

    weights: int
    kv_cache: int | None = 0
    kv_per_token: int = 0
    max_length: int = 0
    max_num_seqs: int = 0
    per_request: int = 0
    buffers: int = 0
    graphs: int = 0


@dataclass(frozen=True)
class PlannedRun:
    """The settings of a run that determine its memory.

    Attributes:
        policy: Settings of the policy.
        engine: The engine on the trainer's device, None if it runs elsewhere.
        longest_row: Inputs of the longest row, in tokens.
        group_size: Siblings of a group.
        num_rows: Rows of a rank's step.
        num_micro_batches: Micro-batches of a step without a token budget.
        num_ranks: Ranks of the run.
        is_sharded: Whether weights and optimizer are sharded over the ranks.
        num_moments: Values that the optimizer keeps for each weight.
        shares_device: Whether only one of trainer and engine is on the device at a time (HotSwap).
        can_share_device: Whether the run's settings allow that.
        is_gpu: Whether the device is a GPU.
        teacher_bytes: Bytes of a teacher's adapter, which each rank has whole.
    """

    policy: PolicyConfig
    engine: PlannedEngine | None
    longest_row: int
    group_size: int
    num_rows: int
    num_micro_batches: int = 1
    num_ranks: int = 1
    is_sharded: bool = False
    num_moments: int = 2
    shares_device: bool = False
    can_share_device: bool = True
    is_gpu: bool = True
    teacher_bytes: int = 0


@dataclass(frozen=True)
class Part:
    """A row of the plan.

    Attributes:
        side: Whose it is.
        name: What it is.
        num_bytes: Its size at the peak of that side.
        stays: Whether it stays on the device while the other side owns it.
    """

    side: Side
    name: str
    num_bytes: int
    stays: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a rank on its device.

    Attributes:
        parts: Where it goes.
        available: Bytes that the run may use.
        shares_device: Whether only one of trainer and engine is on the device at a time (HotSwap).

    >>> parts = (Part("trainer", "weights", 2 * GIB), Part("engine", "KV cache", 4 * GIB), Part("engine", "graphs", GIB, True))
    >>> plan = MemoryPlan(parts, 16 * GIB)
    >>> plan.text
    'trainer: weights 2.0; engine: KV cache 4.0, graphs 1.0; peak 7.0 of 16.0 GiB'
    >>> MemoryPlan(parts, 16 * GIB, shares_device=True).total // GIB
    5
    """

    parts: tuple[Part, ...]
    available: int
    shares_device: bool = False

    def side(self, side: Side) -> int:
        """Bytes of one side, without what stays."""
        return sum(part.num_bytes for part in self.parts if part.side == side and not part.stays)

    @property
    def stays(self) -> int:
        """Bytes that stay on the device while the other side owns it: contexts and CUDA graphs."""
        return sum(part.num_bytes for part in self.parts if part.stays)

    def size(self, side: Side, name: str) -> int:
        """Bytes of a part; 0 if there is none of that name."""
        return sum(part.num_bytes for part in self.parts if (part.side, part.name) == (side, name))

    @property
    def total(self) -> int:
        """Largest number of bytes on the device at a time."""
        sides = self.side("trainer"), self.side("engine")
        return self.stays + (max(sides) if self.shares_device else sum(sides))

    @property
    def fits(self) -> bool:
        """Whether the peak is within the available memory."""
        return self.total <= self.available

    @property
    def text(self) -> str:
        """The plan in one line."""
        shown = [
            f"{side}: {', '.join(f'{part.name} {part.num_bytes / GIB:.1f}' for part in own)}"
            for side in SIDES
            if (own := [part for part in self.parts if part.side == side])
        ]
        joint = " (one side at a time)" if self.shares_device else ""
        return f"{'; '.join(shown)}; peak{joint} {self.total / GIB:.1f} of {self.available / GIB:.1f} GiB"


def memory_plan(run: PlannedRun, weights: Weights, activations: Activations, available: int) -> MemoryPlan:
    """The plan of a run.

    Args:
        run: Its settings.
        weights: Sizes of the policy.
        activations: What the largest micro-batch needs, simulated or measured.
        available: Bytes that the run may use.
    """
    trainer = trainer_parts(run, weights, activations)
    size = 0 if run.engine is None else run.engine.kv_cache
    if size is None:
        without = MemoryPlan((*trainer, *engine_parts(run, 0)), available, run.shares_device)
        taken = without.stays + without.side("engine") + (0 if run.shares_device else without.side("trainer"))
        size = max(available - taken, fewest_rows(run))
    return MemoryPlan((*trainer, *engine_parts(run, size)), available, run.shares_device)


def trainer_parts(run: PlannedRun, weights: Weights, activations: Activations) -> tuple[Part, ...]:
    """The trainer's side at its peak, in forward and backward, or in the optimizer's step if that needs more."""
    shards = _num_shards(run)
    moving = activations.kept + activations.logits + activations.transients
    # Optimizers of torch update many weights at once on a GPU, with a copy of them (`foreach`, torch.optim.AdamW).
    update = FLOAT_BYTES * weights.num_trained // shards if run.is_gpu else 0
    parts = {
        # Without an adapter they are the reference, which FSDP leaves whole.
        "frozen weights": weights.frozen // (shards if run.policy.lora.enabled else 1),
        _name_of_trained(run): _trained(run, weights),
        "adapter of the teacher": run.teacher_bytes,
        # The weights outside of blocks are gathered for the whole forward, and a block while the one before it computes.
        "weights gathered by FSDP": 2 * weights.block + weights.outside if run.is_sharded else 0,
        # DDP copies gradients into buckets (`gradient_as_bucket_view` is off by default).
        "gradient buckets of DDP": FLOAT_BYTES * weights.num_trained if run.num_ranks > 1 and not run.is_sharded else 0,
        "kept activations": activations.kept,
        "logits of a chunk": activations.logits,
        "transients": activations.transients,
        "update of the optimizer": max(update - moving, 0),
        "CUDA context": CONTEXT_BYTES if run.is_gpu else 0,
    }
    staying = _staying(run)
    return tuple(Part("trainer", name, size, name in staying) for name, size in parts.items() if size)


def _name_of_trained(run: PlannedRun) -> str:
    return "LoRA, gradients, optimizer" if run.policy.lora.enabled else "weights, gradients, optimizer"


def _staying(run: PlannedRun) -> set[str]:
    """Parts that HotSwap leaves on the device: all weights with FSDP2, the trained ones with DDP."""
    if run.is_sharded:
        return {"CUDA context", "frozen weights", _name_of_trained(run)}
    return {"CUDA context", _name_of_trained(run), "gradient buckets of DDP"} if run.num_ranks > 1 else {"CUDA context"}


def _num_shards(run: PlannedRun) -> int:
    return run.num_ranks if run.is_sharded else 1


def _trained(run: PlannedRun, weights: Weights) -> int:
    """Bytes of the trained weights, their gradients, and what the optimizer keeps for them.

    Gradients of a sharded adapter are reduced at the end of a step, so each rank keeps them whole until then.
    """
    gradients = weights.num_trained // (1 if run.policy.lora.enabled else _num_shards(run))
    return FLOAT_BYTES * ((1 + run.num_moments) * weights.num_trained // _num_shards(run) + gradients)


def engine_parts(run: PlannedRun, kv_cache: int) -> tuple[Part, ...]:
    """The engine's side at its peak, with a given number of bytes for keys and values."""
    engine = run.engine
    if engine is None:
        return ()
    parts = {
        "weights": engine.weights,
        "KV cache": kv_cache,
        "activations and buffers": engine.buffers + engine.max_num_seqs * engine.per_request,
        "CUDA graphs": engine.graphs,
        "CUDA context": CONTEXT_BYTES if run.is_gpu else 0,
    }
    return tuple(Part("engine", name, size, name.startswith("CUDA")) for name, size in parts.items() if size)


def fewest_rows(run: PlannedRun) -> int:
    """Bytes of keys and values for one group of the longest rows: with less, its siblings wait for each other."""
    engine = run.engine
    return 0 if engine is None else engine.kv_per_token * engine.max_length * min(run.group_size, engine.max_num_seqs)


def checkpoint_bytes(run: PlannedRun, weights: Weights) -> int:
    """Bytes of a checkpoint file: trained weights and what the optimizer keeps for them."""
    return FLOAT_BYTES * (1 + run.num_moments) * weights.num_trained


def sync_bytes(run: PlannedRun, weights: Weights) -> int:
    """Bytes of the file that brings trained weights to the engine: an adapter in float32, or all weights in `policy.dtype`."""
    itemsize = FLOAT_BYTES if run.policy.lora.enabled else getattr(torch, run.policy.dtype).itemsize
    return (weights.num_trained - weights.num_critic) * int(itemsize)


def host_bytes(run: PlannedRun, weights: Weights, activations: Activations) -> int:
    """Memory of the machine that all ranks need, if they are on one: processes, and the larger of loading and training.

    While it loads, each rank has the model in host memory, or only the first one if weights are sharded. While it trains, HotSwap
    keeps a copy of the side that is not on the device, and offloaded activations are there.
    """
    dtype = getattr(torch, run.policy.dtype).itemsize if run.policy.lora.enabled else FLOAT_BYTES
    loading = weights.num_served * dtype * (1 if run.is_sharded else run.num_ranks)
    engine = 0 if run.engine is None else run.engine.weights
    moments = FLOAT_BYTES * run.num_moments * weights.num_trained  # with DDP, the trained weights stay on the device
    trainer = 0 if run.is_sharded else weights.frozen + (_trained(run, weights) if run.num_ranks == 1 else moments)
    copies = trainer + engine if run.shares_device else 0
    processes = PROCESS_BYTES * run.num_ranks * (1 if run.engine is None else 2)
    return processes + max(loading, run.num_ranks * (copies + activations.on_host))
