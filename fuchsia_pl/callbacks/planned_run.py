"""What the memory plan of a run depends on, from its module, its data module and its trainer's settings."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from fuchsia_pl.datamodule import RolloutDataModule
from fuchsia_pl.engines.base import Engine
from fuchsia_pl.engines.vllm_arguments import GPU_BATCHED_TOKENS, VLLMSettings
from fuchsia_pl.engines.vllm_colocated import VLLMColocatedEngine
from fuchsia_pl.engines.vllm_kv_cache import CONTEXT_GB, GRAPHS_GB, LOGITS_BYTES, overhead_gb, weights_gb
from fuchsia_pl.module import GRPOModule
from fuchsia_pl.policy.adapter import adapter_bytes
from fuchsia_pl.policy.plan import GIB, PlannedEngine, PlannedRun
from fuchsia_pl.policy.plan_simulation import Simulator
from fuchsia_pl.policy.plan_sizes import MicroBatch
from fuchsia_pl.policy.planner import Planner
from fuchsia_pl.policy.teacher_adapter import SETTING
from fuchsia_pl.rollouts import budget
from fuchsia_pl.rollouts.budget import LongestRow
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.rollouts.training_phase import Forward

logger = logging.getLogger(__name__)

# Adam and AdamW; for an optimizer that cannot be tried on a tiny weight.
NUM_MOMENTS = 2


@dataclass(frozen=True)
class TrainerSettings:
    """Settings of a Lightning trainer that determine memory.

    Attributes:
        precision: `trainer.precision`.
        num_micro_batches: `trainer.accumulate_grad_batches`.
        num_ranks: Number of ranks.
        is_sharded: Whether weights are sharded over them.
        shares_device: Whether HotSwap is enabled.
        is_gpu: Whether the ranks have GPUs.
    """

    precision: str
    num_micro_batches: int = 1
    num_ranks: int = 1
    is_sharded: bool = False
    shares_device: bool = False
    is_gpu: bool = True

    @property
    def autocast(self) -> torch.dtype | None:
        """Type of products under Lightning's mixed precision."""
        return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision)


@dataclass(frozen=True)
class RunParts:
    """The parts of a run that are planned.

    Attributes:
        module: Policy, objective and optimizer. Nothing of it has to be loaded.
        data: Sampling, sizes and engine.
        architecture: The model.
        row: The longest row.
        trainer: Settings of the trainer.
    """

    module: GRPOModule
    data: RolloutDataModule
    architecture: PretrainedConfig
    row: LongestRow
    trainer: TrainerSettings

    def run(self) -> PlannedRun:
        """The run to plan."""
        trainer, sampling = self.trainer, self.data.sampling
        return PlannedRun(
            policy=self.module.policy_config,
            engine=planned_engine(
                self.data.engine, self.module, self.architecture, sampling.max_length, trainer.is_gpu
            ),
            longest_row=self.row.num_inputs,
            group_size=sampling.group_size,
            num_rows=self.num_groups * sampling.group_size,
            num_micro_batches=trainer.num_micro_batches,
            num_ranks=trainer.num_ranks,
            is_sharded=trainer.is_sharded,
            num_moments=num_moments(self.module.optimizer),
            shares_device=trainer.shares_device,
            can_share_device=self.can_share_device,
            is_gpu=trainer.is_gpu,
            teacher_bytes=self.teacher_bytes,
        )

    @property
    def teacher_bytes(self) -> int:
        """Memory of the teacher's adapter; 0 without one."""
        teacher = self.data.teacher
        return 0 if teacher is None or teacher.adapter is None else adapter_bytes(SETTING, teacher.adapter)

    def planner(self, available: int, shares_prefix: bool) -> Planner:
        """Plans this run and others that differ in settings that save memory.

        Args:
            available: Bytes that a run may use.
            shares_prefix: Whether the prompt of a group is computed once.
        """
        loss = self.module.loss_config
        simulator = Simulator(
            self.architecture,
            self.trainer.autocast,
            with_reference=loss.beta > 0,
            with_critic=loss.parts.advantage == "gae",
            is_gpu=self.trainer.is_gpu,
        )
        return Planner(simulator, self.largest(shares_prefix), available)

    def largest(self, shares_prefix: bool) -> Callable[[PlannedRun], MicroBatch]:
        """The largest micro-batch of a run, as the rehearsal at the start of a run takes it."""
        shares = shares_prefix and self.has_single_rows
        return partial(_largest, self.row, self.num_groups, self.data.sampling, shares)

    @property
    def can_share_device(self) -> bool:
        """Whether HotSwap could be enabled; see `hotswap.obstacle`."""
        data = self.data
        needs_trainer = data.loss.needs_signals or data.teacher is not None
        return data.engine.can_sleep and not data.sampling.max_staleness and not needs_trainer

    @property
    def num_groups(self) -> int:
        """Groups of rows of a rank's step, as many as it may have."""
        # At least one: mini-batches are checked for the stage fit only.
        share = max(self.data.batch_size // (self.trainer.num_ranks * self.data.loss.mini_batches), 1)
        return share * self.data.environment.max_rows

    @property
    def has_single_rows(self) -> bool:
        """Whether every rollout is one row, which begins with the prompt of its group."""
        return self.data.environment.max_rows == 1


def _largest(
    row: LongestRow, num_groups: int, sampling: SamplingConfig, shares_prefix: bool, run: PlannedRun
) -> MicroBatch:
    max_tokens = run.policy.max_tokens_per_micro_batch
    forward = Forward(run.num_micro_batches, shares_prefix, lambda batches: [], max_tokens=max_tokens)
    return MicroBatch.of(budget.longest_batch(row, num_groups, sampling, forward, step=0), shares_prefix)


def num_moments(optimizer: OptimizerCallable) -> int:
    """Values that an optimizer keeps for each weight, found by a step on a tiny one.

    >>> num_moments(torch.optim.AdamW), num_moments(torch.optim.SGD)
    (2, 0)
    """
    weight = nn.Parameter(torch.zeros(2, 3))
    weight.grad = torch.ones_like(weight)
    try:
        made = optimizer([weight])
        made.step()
    except Exception as error:  # an optimizer of another library may need a GPU
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        logger.warning("the memory plan assumes %d values of the optimizer per weight: %s", NUM_MOMENTS, reason)
        return NUM_MOMENTS
    return sum(1 for value in made.state[weight].values() if torch.is_tensor(value) and value.shape == weight.shape)


def planned_engine(
    engine: Engine, module: GRPOModule, architecture: PretrainedConfig, max_length: int, is_gpu: bool
) -> PlannedEngine | None:
    """The engine's memory on the trainer's device, None if it runs elsewhere.

    Args:
        engine: The engine; it need not run.
        module: The module, with the served model's type and rank.
        architecture: The served model.
        max_length: Longest prompt plus completion, in tokens.
        is_gpu: Whether the device is a GPU.
    """
    if engine.weights_share == 0.0:
        return None
    policy = module.policy_config
    with torch.device("meta"):
        blank = AutoModelForCausalLM.from_config(architecture)
    if not isinstance(engine, VLLMColocatedEngine):
        return PlannedEngine(
            int(weights_gb(blank, policy.dtype, False) * engine.weights_share * GIB), engine.kv_cache_bytes
        )
    settings = engine.settings
    share = 1 / settings.tensor_parallel_size if is_gpu else 1.0
    weights = int(weights_gb(blank, policy.dtype, settings.quantization is not None) * share * GIB)
    arguments = settings.engine_args
    if is_gpu:
        weights = max(weights - int(arguments.get("cpu_offload_gb", 0.0) * GIB), 0)
    is_fp8 = str(arguments.get("kv_cache_dtype", "")).startswith("fp8")
    itemsize = 1 if is_fp8 else getattr(torch, policy.dtype).itemsize
    per_token = int(kv_bytes_per_token(architecture, itemsize) * share)
    cache = None if settings.kv_cache_gb == "auto" and is_gpu else engine.kv_cache_bytes
    if not is_gpu:
        return PlannedEngine(weights, cache, per_token, max_length)
    overhead = _overhead(engine, settings, blank, module, architecture.get_text_config().vocab_size)
    return PlannedEngine(weights, cache, per_token, max_length, *overhead)


def _overhead(
    engine: VLLMColocatedEngine, settings: VLLMSettings, blank: nn.Module, module: GRPOModule, vocab_size: int
) -> tuple[int, int, int, int]:
    """Requests, bytes for each of them, other buffers, and graphs, by the engine's own estimate."""
    policy = module.policy_config
    served_rank = policy.lora.r if policy.lora.enabled and engine.sync_mode != "merge" else 0
    num_tokens = int(settings.engine_args.get("max_num_batched_tokens", max(GPU_BATCHED_TOKENS, settings.max_num_seqs)))
    per_request = LOGITS_BYTES * vocab_size
    graphs = 0.0 if settings.enforce_eager else GRAPHS_GB
    total = overhead_gb(blank, policy.dtype, served_rank, num_tokens, settings)
    buffers = int((total - graphs - CONTEXT_GB) * GIB) - settings.max_num_seqs * per_request
    return settings.max_num_seqs, per_request, buffers, int(graphs * GIB)


def kv_bytes_per_token(architecture: PretrainedConfig, itemsize: int) -> int:
    """Bytes of keys and values of a token, if every layer attends to all tokens.

    Args:
        architecture: The model.
        itemsize: Bytes of a number.

    >>> from fuchsia_pl.policy.architectures import architecture_of
    >>> kv_bytes_per_token(architecture_of("Qwen/Qwen2.5-1.5B-Instruct"), 2)  # 2 x 28 layers x 2 heads x 128 x 2 bytes
    28672
    """
    model = architecture.get_text_config()
    sizes = model.to_dict()
    width = sizes.get("head_dim") or model.hidden_size // model.num_attention_heads
    return int(
        2 * model.num_hidden_layers * (sizes.get("num_key_value_heads") or model.num_attention_heads) * width * itemsize
    )
