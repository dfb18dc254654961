"""One run folder for all ranks, launched by Lightning on one machine, by torchrun or by SLURM."""

import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from torch.distributed import DistError, TCPStore

from fuchsia_pl import orphans
from fuchsia_pl.types import ConfigError

RUN_FOLDER_VARIABLE = "FUCHSIA_RUN_FOLDER"
CHECKPOINT_VARIABLE = "FUCHSIA_CHECKPOINT"
TIMEOUT_S = 120.0
# torchrun's own store is in its agent. If the agent has no store, the first rank keeps one here until the process ends.
_stores: list[TCPStore] = []


def is_first_rank() -> bool:
    """Whether this process is rank 0 of the run."""
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        if environment.detect():
            return environment().global_rank() == 0
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def is_launched() -> bool:
    """Whether the first rank's Lightning started this process."""
    return not (is_first_rank() or TorchElasticEnvironment.detect() or SLURMEnvironment.detect())


def to_first_rank() -> Callable[[int], None] | None:
    """A function that sends a signal to the first rank, which forwards it to all; None if that is not the parent process."""
    parent = orphans.parent_in_run() if is_launched() else None
    return None if parent is None else partial(os.kill, parent)


def agreed_folder(make: Callable[[], Path], make_named: Callable[[str], Path]) -> Path:
    """The first rank's new folder, on every rank.

    Args:
        make: Makes a new numbered folder; called on the first rank only.
        make_named: Makes the folder with a name that no other run has. All ranks of a SLURM job step call it.

    Raises:
        ConfigError: The first rank published no folder within two minutes, or it is on another machine and its address is
            not set.
    """
    if TorchElasticEnvironment.detect():
        folder = _published_by_first_rank("folder", make)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    # A batch script without srun is one process, and may call the command again: its runs are numbered as usual.
    if SLURMEnvironment.detect() and "SLURM_STEP_ID" in os.environ:
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        return make_named("slurm-" + ".".join(os.environ[name] for name in names if name in os.environ))
    if LightningEnvironment().node_rank() > 0:
        raise ConfigError(
            "this is not the first of several machines, and the folder of the run is not known here: start the run with "
            "`torchrun -m fuchsia_pl` or `srun fuchsia`, see the README"
        )
    if not is_first_rank() and RUN_FOLDER_VARIABLE in os.environ:
        return Path(os.environ[RUN_FOLDER_VARIABLE])  # Lightning started this process from the first rank's
    folder = make()
    os.environ[RUN_FOLDER_VARIABLE] = str(folder)
    return folder


def agreed_checkpoint(find: Callable[[], Path]) -> Path:
    """The first rank's choice of a checkpoint, on every rank: another run may write a newer one in the meantime.

    Args:
        find: Chooses; called on the first rank only, and on all ranks of a SLURM job step, which are not connected yet.

    Raises:
        ConfigError: There is none, or the first rank published none within two minutes.
    """
    if TorchElasticEnvironment.detect():
        return _published_by_first_rank("checkpoint", find)
    if not is_first_rank() and CHECKPOINT_VARIABLE in os.environ:
        return Path(os.environ[CHECKPOINT_VARIABLE])
    path = find()
    os.environ[CHECKPOINT_VARIABLE] = str(path)
    return path


def _published_by_first_rank(what: str, make: Callable[[], Path]) -> Path:
    environment = TorchElasticEnvironment()
    has_agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    key = f"fuchsia/{what}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    where = f"{environment.main_address}:{environment.main_port}"
    try:
        store = TCPStore(
            environment.main_address,
            environment.main_port,
            is_master=is_first_rank() and not has_agent_store,
            timeout=timedelta(seconds=TIMEOUT_S),
            wait_for_workers=False,
            multi_tenant=True,
        )
        _stores.append(store)
        if is_first_rank():
            store.set(key, str(make()))
        return Path(store.get(key).decode())
    except DistError as error:
        raise ConfigError(
            f"rank {environment.global_rank()} got no {what} of the run from rank 0 at {where}: {error}. Check "
            "MASTER_ADDR and MASTER_PORT, and that the machines can reach each other"
        ) from error
