"""Sharding by FSDP2: each rank keeps a shard of every weight, and a block gathers its weights only while it computes."""

import shutil
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from fuchsia_pl.policy.checkpointing import transformer_blocks
from fuchsia_pl.policy.checksums import check_intact, damaged_part
from fuchsia_pl.policy.config import PolicyConfig
from fuchsia_pl.types import ConfigError

DEFAULT_TIMEOUT_S = 1800.0
FOLDER_METADATA = "meta.pt"  # Lightning's file for everything but weights and optimizer
T = TypeVar("T")


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's FSDP2 strategy, sharding over all ranks. Tested on CPU processes; untested on a GPU.

    Args:
        save_distributed_checkpoint: If True, each rank writes its own shards and a checkpoint is a folder. Otherwise the first
            rank writes one file, from which a run with any strategy and number of ranks can resume.
        timeout_s: Seconds for which a rank waits for the others in a collective operation before the run ends.

    Raises:
        ConfigError: `timeout_s` is not above 0.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        if timeout_s <= 0:
            raise ConfigError(f"trainer.strategy.init_args.timeout_s must be above 0, got {timeout_s}")
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            timeout=timedelta(seconds=timeout_s),
        )

    def setup_environment(self) -> None:
        """Sets the mesh to all ranks. Their number is not known earlier. Lightning's default shards over nodes only."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trained weights. Lightning's version would gather the frozen base as well."""
        assert self.model is not None
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        return trained if self._save_distributed_checkpoint else tree_map_only(Tensor, self._on_writer, trained)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state dict; unsharded if the checkpoint is one file, so that every strategy can load it."""
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return tree_map_only(Tensor, self._on_writer, inner.state_dict())

    def _on_writer(self, tensor: Tensor) -> Tensor:
        """The whole tensor in host memory of the writing rank; all ranks take part, and the others keep nothing."""
        gathered = whole(tensor)
        return gathered.cpu() if self.is_global_zero else gathered.new_empty(0, device="cpu")

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Writes a file, or a folder that replaces an older one only after all ranks have written their shards."""
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(filepath))
        partial, older = path.with_name(f".{path.name}.partial"), older_folder(path)
        if self.global_rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        self.barrier()
        super().save_checkpoint(checkpoint, partial, storage_options)
        self.barrier()
        if self.global_rank == 0:
            if path.exists():
                shutil.rmtree(older, ignore_errors=True)
                path.rename(older)
            partial.rename(path)
            shutil.rmtree(older, ignore_errors=True)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads weights and optimizers and returns the rest, from a file of any strategy or a folder of this one.

        If a run was killed while one folder replaced another, the older folder is loaded.

        Raises:
            ConfigError: The file or a file of the folder is damaged.
        """
        path = Path(checkpoint_path)
        path = self.broadcast(path if path.exists() or not older_folder(path).is_dir() else older_folder(path))
        if path.is_dir():
            # Only one rank verifies the files, since they are read twice.
            index = dcp.FileSystemReader(path).read_metadata()
            damage = self.broadcast(damaged_part(path, index) if self.is_global_zero else None)
            if damage is not None:
                raise ConfigError(f"the checkpoint {path} is not complete: {damage}. Give another one")
            return self._load_folder(path, weights_only)
        check_intact(path)
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        assert self.model is not None
        weights = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            # The module reports differing names and shapes; Lightning calls it next.
            for name, saved in checkpoint["state_dict"].items():
                if name in weights and weights[name].shape == saved.shape:
                    weights[name].copy_(_spread_like(weights[name], saved))
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            _load_optimizer(optimizer, state)
        return checkpoint

    def _load_folder(self, path: Path, weights_only: bool | None) -> dict[str, Any]:
        assert self.model is not None
        options = StateDictOptions(ignore_frozen_params=True, strict=False)
        found: dict[str, Any] = {"state_dict": get_model_state_dict(self.model, options=options)}
        dcp.load(found, checkpoint_id=path)
        set_model_state_dict(self.model, found["state_dict"], options=options)
        for number, optimizer in enumerate(self.optimizers):
            state: dict[str, Any] = {f"optimizer_{number}": get_optimizer_state_dict(self.model, optimizer)}
            dcp.load(state, checkpoint_id=path)
            set_optimizer_state_dict(self.model, optimizer, state[f"optimizer_{number}"])
        return torch.load(path / FOLDER_METADATA, map_location="cpu", weights_only=weights_only)


def older_folder(path: Path) -> Path:
    """Path of a folder checkpoint while a newer one replaces it."""
    return path.with_name(f".{path.name}.older")


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Loads an unsharded state dict; tensors with the shape of their weight are sharded like it."""
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    spread = {
        number: {
            key: _spread_like(weights[number], value) if _belongs(value, weights[number]) else value
            for key, value in of_weight.items()
        }
        for number, of_weight in state["state"].items()
        if number < len(weights)
    }
    optimizer.load_state_dict({**state, "state": spread})


def _belongs(value: Any, weight: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == weight.shape


def _spread_like(weight: Tensor, tensor: Tensor) -> Tensor:
    """Shards a tensor that every rank has whole, like the weight."""
    tensor = tensor.to(weight.device)
    if not isinstance(weight, DTensor):
        return tensor
    return distribute_tensor(tensor, weight.device_mesh, weight.placements, src_data_rank=None)


def shard(policy: nn.Module, model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shards a policy in place. Each block of its model is one unit; embeddings, norm, output head and critic form another.

    Frozen and trained weights of a unit are gathered together, each in its type.

    Args:
        policy: The module whose `forward` is called.
        model: The transformers model inside it.
        mesh: One-dimensional, over all ranks.
    """
    for block in transformer_blocks(model):
        fully_shard(block, mesh=mesh)
    # Without resharding, gathered head weights would stay stale if an optimizer step follows a forward without backward.
    fully_shard(policy, mesh=mesh, reshard_after_forward=True)


def check_sharded(trainer: Trainer, policy: PolicyConfig) -> None:
    """Checks that the weights can be sharded, if the trainer's strategy does that.

    Raises:
        ConfigError: They have 4 bits: FSDP2 replaces each weight by its shard, which has no quantization constants any more.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy) and policy.quantization is not None:
        raise ConfigError(
            f'model.policy.quantization="{policy.quantization}" does not work with {type(trainer.strategy).__name__}: sharding '
            "replaces the weights and loses their quantization constants. Leave it out, or use ddp, which keeps a whole copy on "
            "each device"
        )


def mesh_of_all_ranks(mesh: DeviceMesh, num_ranks: int) -> DeviceMesh:
    """The part of a strategy's mesh over which it averages gradients.

    Raises:
        ConfigError: It does not have all ranks.
    """
    averaging = mesh["data_parallel"]
    if averaging.size() != num_ranks:
        raise ConfigError(
            f"trainer.strategy averages over {averaging.size()} of {num_ranks} ranks, whose weights would diverge: use "
            "fuchsia_pl.policy.sharding.FSDP2Strategy (--config overlays/fsdp.yaml), or ddp"
        )
    return averaging


def built_on_all_ranks(build: Callable[[], T]) -> T:
    """Calls a function on every rank. If it raises a ConfigError on some of them, all ranks raise the first one.

    Otherwise ranks without an error would wait for the others, and the error of a rank may be on its own output only.

    Raises:
        ConfigError: The function raised it on some rank.
    """
    made: list[T] = []
    problem: str | None = None
    try:
        made.append(build())
    except ConfigError as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise ConfigError(found)
    return made[0]


def fill_from_first_rank(model: nn.Module, weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Fills a model on all ranks with the weights and buffers of the first rank. All ranks must call this together.

    Weights are sent one at a time, and a rank keeps only its shard, so no other rank holds the whole model at any time.

    Args:
        model: Sharded or not; on the meta device on ranks that have no weights.
        weights: On the first rank its whole state dict; ignored on others.
        device: Where a model from the meta device is allocated.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        model.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dict(weights), options=options)
    # Those that are not in the state dict, such as the frequencies of rotary embeddings. Names, since buffers may be shared.
    buffers = dict(model.named_buffers(remove_duplicate=False))
    sent = of_first_rank({name: buffer.cpu() for name, buffer in buffers.items()})
    for name, buffer in buffers.items():
        buffer.copy_(sent[name])


def of_first_rank(value: T) -> T:
    """The value that the first rank has. All ranks must call this together."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def whole(tensor: Tensor) -> Tensor:
    """The unsharded tensor. If it is sharded, all ranks must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The shard of a tensor on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def total_norm(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of all tensors as one vector; of sharded tensors, over all ranks."""
    return whole(torch.nn.utils.get_total_norm(tensors))
