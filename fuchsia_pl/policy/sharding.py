"""Sharding by FSDP2: every weight lies on all ranks in parts, and a block has its own together only while it computes."""

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
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
from fuchsia_pl.types import ConfigError

DEFAULT_TIMEOUT_S = 1800.0
FOLDER_METADATA = "meta.pt"  # Lightning's name for what is neither weights nor optimizer


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's own strategy for FSDP2, over all ranks. Run on CPU processes; untested on a GPU.

    Args:
        save_distributed_checkpoint: Each rank writes its own part, and a checkpoint is a folder; otherwise the first rank
            writes one file, which runs with any strategy and number of ranks go on from.
        timeout_s: How long a rank waits for the others, in an exchange, before the run ends.

    Raises:
        ConfigError: The time is not above 0.
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
        """Only now is the number of ranks known; Lightning's own default shards over nodes alone."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trained weights; Lightning would gather the frozen base as well, for the module to throw away."""
        assert self.model is not None
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        return trained if self._save_distributed_checkpoint else tree_map_only(Tensor, self._on_writer, trained)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's own state dict, whole where the checkpoint is one file: then every strategy reads it."""
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return tree_map_only(Tensor, self._on_writer, inner.state_dict())

    def _on_writer(self, tensor: Tensor) -> Tensor:
        """The whole tensor on the host of the rank that writes; all ranks take part, and the others keep nothing of it."""
        gathered = whole(tensor)
        return gathered.cpu() if self.is_global_zero else gathered.new_empty(0, device="cpu")

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Writes a file, or a folder that takes the place of an older one only when all ranks have written their parts."""
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
        """Loads weights and optimizers, and returns the rest; from a file of any strategy, or a folder of this one.

        A run that was killed while a folder took another's place has left that other one, which is loaded then.

        Raises:
            ConfigError: The file is damaged, or a part of the folder is.
        """
        path = Path(checkpoint_path)
        path = self.broadcast(path if path.exists() or not older_folder(path).is_dir() else older_folder(path))
        if path.is_dir():
            # The parts are read twice, so by one rank.
            index = dcp.FileSystemReader(path).read_metadata()
            damage = self.broadcast(damaged_part(path, index) if self.is_global_zero else None)
            if damage is not None:
                raise ConfigError(f"the checkpoint {path} is not whole: {damage}. Give another one")
            return self._load_folder(path, weights_only)
        check_intact(path)
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        assert self.model is not None
        weights = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            # Names and shapes that differ are told by the module, which is asked next.
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
    """Where a folder of parts waits while a newer one takes its place."""
    return path.with_name(f".{path.name}.older")


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Loads a state dict that is whole; what has its weight's shape is spread as the weight is."""
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
    """A tensor that every rank has whole, in the parts in which a weight lies."""
    tensor = tensor.to(weight.device)
    if not isinstance(weight, DTensor):
        return tensor
    return distribute_tensor(tensor, weight.device_mesh, weight.placements, src_data_rank=None)


def shard(policy: nn.Module, model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shards a policy in place: each block of its model is one unit; embeddings, norm, output head and critic are another.

    Frozen and trained weights of a unit are gathered together, each in its own type.

    Args:
        policy: The module whose `forward` computes.
        model: The transformers model inside it.
        mesh: One-dimensional, over all ranks.
    """
    for block in transformer_blocks(model):
        fully_shard(block, mesh=mesh)
    # Kept after a forward, the head's weights would outlive an optimizer step that follows a forward without backward.
    fully_shard(policy, mesh=mesh, reshard_after_forward=True)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, put together from all ranks where it is sharded. All ranks have to ask for it at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def total_norm(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of all tensors as one vector, over all ranks where they are sharded."""
    return whole(torch.nn.utils.get_total_norm(tensors))
