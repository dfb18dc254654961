"""`--ckpt_path`: finds the checkpoint and checks it, before anything is built."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import Strategy
from rich.console import Console

from fuchsia_pl.callbacks.evaluation_log import evaluation_files
from fuchsia_pl.callbacks.rollout_log import log_files
from fuchsia_pl.callbacks.run_metrics import METRICS_FILE, Row, rows_before
from fuchsia_pl.cli.run_folder import SAVED_CONFIG
from fuchsia_pl.evaluation.held_out import HeldOut, read_held_out
from fuchsia_pl.files import mend_lines
from fuchsia_pl.module import GRPOModule
from fuchsia_pl.policy.checkpoint_files import check_trained, read_checkpoint
from fuchsia_pl.policy.sharding import FSDP2Strategy, older_folder
from fuchsia_pl.types import ConfigError

LAST, BEST = "last", "best"
CHECKPOINT_FOLDER = "checkpoints"
LAST_FILE = "last.ckpt"
OLDER_FILES = "step-*.ckpt"

logger = logging.getLogger(__name__)


def find_checkpoint(given: str, runs: Path, console: Console) -> Path:
    """The checkpoint of `--ckpt_path`.

    Args:
        given: A path, `last` (the newest whole one of a config's runs) or `best` (the one that a `ModelCheckpoint(monitor=…)` of
            the newest such run kept as its best).
        runs: Folder of the config's runs, `<root>/<config name>`.
        console: Where the choice is printed.

    Raises:
        ConfigError: There is none, or the value is a kind of address that is not supported.
    """
    if given == LAST:
        path, step = _last(runs, console)
        _print_later_runs(path, runs, console)
    elif given == BEST:
        path, step = _best(runs, console)
    else:
        if given == "hpc" or given.startswith("registry"):
            raise ConfigError(
                f"--ckpt_path {given} is a word of Lightning's for checkpoints that Fuchsia-PL does not write: give a path, "
                f"`{LAST}` or `{BEST}`"
            )
        if "://" in given:
            raise ConfigError(
                f"--ckpt_path {given} is an address: a checkpoint is checked before anything loads, so copy it to this machine"
            )
        return Path(given)
    console.print(f"--ckpt_path {given}: {path}, of step {step}", soft_wrap=True, markup=False)
    return path


def _last(runs: Path, console: Console) -> tuple[Path, int]:
    for path in _by_age(folder / CHECKPOINT_FOLDER for folder in _folders(runs)):
        checkpoint = _whole(path, console)
        if checkpoint is not None:
            return path, checkpoint["global_step"]
    raise ConfigError(
        f"--ckpt_path {LAST}: no run under {runs} has left a whole {CHECKPOINT_FOLDER}/{LAST_FILE}. Leave it out to start "
        "a new run, give a path, or set trainer.default_root_dir to the root of those runs"
    )


def _by_age(folders: Iterable[Path]) -> list[Path]:
    """The checkpoints that runs keep by themselves in some folders, the newest first."""
    files = [file for folder in folders for file in (folder / LAST_FILE, *folder.glob(OLDER_FILES))]
    # An older one is a hard link to a former `last.ckpt`, so it has the time of its own step.
    return sorted((file for file in files if _changed(file)), key=_changed, reverse=True)


def read_given(path: Path) -> dict[str, Any]:
    """The checkpoint that a command names, see `read_checkpoint`.

    Raises:
        ConfigError: It cannot be used. The message contains the newest usable one in its folder.
    """
    try:
        return read_checkpoint(path)
    except ConfigError as error:
        for other in _by_age([path.parent]):
            try:
                step = read_checkpoint(other)["global_step"]
            except ConfigError:
                continue
            raise ConfigError(f"{error}. The newest whole one beside it is {other}, of step {step}") from error
        raise


def _print_later_runs(chosen: Path, runs: Path, console: Console) -> None:
    """Prints runs with higher numbers and older checkpoints: a sign that the clock was set back, since numbers only grow."""
    run = chosen.parent.parent.name
    numbers = [int(folder.name) for folder in _folders(runs) if folder.name.isdigit() and run.isdigit()]
    files = {number: runs / str(number) / CHECKPOINT_FOLDER / LAST_FILE for number in numbers if number > int(run)}
    older = [number for number, file in files.items() if 0 < _changed(file) < _changed(chosen)]
    if older:
        console.print(
            f"run {max(older)} began after run {run}, and its {LAST_FILE} has an earlier time. If the clock was set back, give "
            f"its path: --ckpt_path {files[max(older)]}",
            soft_wrap=True,
            markup=False,
        )


def _best(runs: Path, console: Console) -> tuple[Path, int]:
    for folder in sorted(_folders(runs), key=lambda run: _changed(run / CHECKPOINT_FOLDER), reverse=True):
        best = _best_of(folder / CHECKPOINT_FOLDER, console)
        if len(best) > 1:
            listed = ", ".join(f"{path} (by {monitor})" for path, monitor in sorted(best.items()))
            raise ConfigError(f"--ckpt_path {BEST}: the newest run has several: {listed}. Give the path of one")
        for path in best:
            return path, read_checkpoint(path)["global_step"]
    raise ConfigError(
        f"--ckpt_path {BEST}: no run under {runs} has a checkpoint that a lightning.pytorch.callbacks.ModelCheckpoint with a "
        f"`monitor` kept as its best. Add one to trainer.callbacks, or give a path or `{LAST}`"
    )


def _best_of(folder: Path, console: Console) -> dict[Path, str]:
    """The monitor of each whole checkpoint that is the best of its run, according to the newest checkpoint in the folder."""
    for path in sorted(folder.glob("*.ckpt"), key=_changed, reverse=True):
        checkpoint = _whole(path, console)
        if checkpoint is None:
            continue
        states = [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, dict)]
        kept = {
            _moved(folder, Path(state["best_model_path"])): str(state["monitor"])
            for state in states
            if state.get("monitor") and state.get("best_model_path")
        }
        return {best: monitor for best, monitor in kept.items() if _whole(best, console) is not None}
    return {}


def _moved(folder: Path, best: Path) -> Path:
    """The path of the best: the root may have been moved since it was saved, or the run may have resumed another run."""
    return folder / best.name if (folder / best.name).exists() else best


def _folders(runs: Path) -> Iterator[Path]:
    return (folder for folder in (runs.iterdir() if runs.is_dir() else ()) if folder.is_dir())


def _changed(path: Path) -> float:
    """Time of the last write, 0 if it does not exist."""
    places = [place for place in (path, older_folder(path)) if place.exists()]
    return max((place.stat().st_mtime for place in places), default=0.0)


def _whole(path: Path, console: Console) -> dict[str, Any] | None:
    try:
        return read_checkpoint(path)
    except ConfigError as error:
        console.print(f"passed over: {error}", soft_wrap=True, markup=False)
        return None


def earlier_metrics(path: Path, checkpoint: Mapping[str, Any]) -> list[Row]:
    """The metrics of a checkpoint's steps, from the folder of the run that saved it.

    Removes incomplete last lines of that run's logs of rollouts, which a kill leaves. A checkpoint may have been copied to any
    folder: files in a folder that is not a run folder are not changed.

    Args:
        path: Path of the checkpoint.
        checkpoint: What `read_checkpoint` returned.
    """
    folder = _run_folder(path)
    if (folder / SAVED_CONFIG).is_file():
        mend_lines([*log_files(folder), *evaluation_files(folder)])
    rows = rows_before(folder, checkpoint)
    if not rows or (checkpoint["global_step"] > len(rows) and not (folder / METRICS_FILE).is_file()):
        logger.warning(
            "%s has no steps before %d: the metrics of this run begin there",
            folder / METRICS_FILE,
            checkpoint["global_step"] - len(rows),
        )
    return rows


def earlier_evaluations(path: Path, checkpoint: Mapping[str, Any]) -> list[HeldOut]:
    """The evaluations up to a checkpoint's step, from the folder of the run that saved it. Arguments as `earlier_metrics`."""
    return [one for one in read_held_out(_run_folder(path)) if one.step <= checkpoint["global_step"]]


def _run_folder(path: Path) -> Path:
    """The folder of the run that saved a checkpoint."""
    folder = path.absolute().parent
    return folder.parent if folder.name == CHECKPOINT_FOLDER else folder


def check_checkpoint(
    checkpoint: Mapping[str, Any], path: str, shapes: Mapping[str, tuple[int, ...]], strategy: Strategy
) -> None:
    """Compares a checkpoint with the model and the strategy of a run, before the engine starts.

    Args:
        checkpoint: What `read_checkpoint` returned.
        path: Its path.
        shapes: What `trained_shapes` returned.
        strategy: The strategy of the run.

    Raises:
        ConfigError: It contains another adapter, or it is a folder and the strategy reads files.
    """
    if "state_dict" not in checkpoint and not isinstance(strategy, FSDP2Strategy):
        raise ConfigError(
            f"the checkpoint {path} is a folder of parts, which only FSDP2Strategy loads: add --config overlays/fsdp.yaml, or "
            "give a checkpoint that is one file"
        )
    check_trained({f"policy.{name}": shape for name, shape in shapes.items()}, checkpoint)


def check_resume(checkpoint: Mapping[str, Any], path: str, module: GRPOModule) -> None:
    """Compares the optimizer of a checkpoint with that of a run that would continue from it.

    Raises:
        ConfigError: The checkpoint has none, or they differ and `resume` chooses neither, or the chosen one cannot be restored.
    """
    is_folder = "state_dict" not in checkpoint
    if not is_folder and "optimizer_states" not in checkpoint:
        raise ConfigError(
            f"the checkpoint {path} holds weights only (save_weights_only), and a run cannot continue without its optimizer: "
            "give another one, or start from an exported adapter with model.policy.lora.init_from"
        )
    keeps_momenta = module.check_resume(checkpoint).keeps_momenta
    if is_folder and not keeps_momenta:
        raise ConfigError(
            f"the checkpoint {path} is a folder of parts, from which another class of optimizer cannot be resumed: leave "
            "model.optimizer as it was, or start from an exported adapter with model.policy.lora.init_from"
        )
