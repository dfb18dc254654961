"""Finds configs, and makes and names the folder of a run.

This module imports no torch before it makes a folder, so that `fuchsia runs` answers at once.
"""

import contextlib
import itertools
import logging
import re
import shutil
import uuid
from pathlib import Path

import fuchsia_pl
from fuchsia_pl.cli.chatter import LOG_FILE
from fuchsia_pl.run_record import RECORD_FILE
from fuchsia_pl.types import ConfigError

CONFIG_FOLDER = Path(fuchsia_pl.__file__).with_name("configs")
OWN_CONFIG_FOLDER = Path("configs")  # of the current folder
DEFAULT_ROOT = "runs"
CONFIG_OPTIONS = ("-c", "--config")
SAVED_CONFIG = "config.yaml"
SAVED_OBJECTIVE = "objective.yaml"
PROBE_BYTES = 1 << 20
# Files that exist when all settings of a run are accepted.
BEFORE_A_RUN = {LOG_FILE, SAVED_CONFIG, SAVED_OBJECTIVE, RECORD_FILE}
TRAINING = "fit"
# Commands that leave a trained policy as it is. Their folders are named after them and numbered apart from trainings.
OTHER_KINDS = ("validate", "test", "eval", "predict")
# Name of a folder of any run: a number, or the name of a SLURM job, after the command if it is not a training.
FOLDER_NAME = re.compile(rf"(?:({'|'.join(OTHER_KINDS)})-)?(\d+|slurm-[\d.]+(?:-\d+)?)")
LOGGER_FILES = ("wandb", "events.out.tfevents.")  # how the names of files begin that loggers make before that

logger = logging.getLogger(__name__)


class ConfigNotFoundError(ConfigError):
    """A config is neither a file nor a packaged config."""


def find_config(name: str) -> str:
    """Finds a config: the path itself, else that name in the packaged folder, else in `./configs`. `.yaml` may be omitted.

    The packaged folder precedes `./configs`, so that a documented command has the same result in every folder. A warning
    names the file in `./configs` that is not used.

    Raises:
        ConfigNotFoundError: None exists. The message lists the existing ones.
        ConfigError: It cannot be read as text.
    """
    folders = (CONFIG_FOLDER, OWN_CONFIG_FOLDER)
    candidates = [Path(name), *(folder / file for folder in folders for file in (name, f"{name}.yaml"))]
    found = [candidate for candidate in candidates if candidate.is_file()]
    if found:
        is_packaged = found[0].is_relative_to(CONFIG_FOLDER)
        if is_packaged and found[-1].is_relative_to(OWN_CONFIG_FOLDER) and not found[-1].samefile(found[0]):
            logger.warning("--config %s is the packaged config; for your own, write --config %s", name, found[-1])
        _check_text(found[0])
        return str(found[0])
    packaged, own = (sorted(str(f.relative_to(folder)) for f in folder.rglob("*.yaml")) for folder in folders)
    there = f"those in ./{OWN_CONFIG_FOLDER} are: {', '.join(own)}; " if own else ""
    raise ConfigNotFoundError(f"the config {name!r} is no file; {there}the packaged configs are: {', '.join(packaged)}")


def _check_text(file: Path) -> None:
    try:
        file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config {file} is no text in UTF-8: {error}") from error


def find_configs(arguments: list[str]) -> list[str]:
    """Replaces every `--config NAME` of a command line by the file it names.

    >>> find_configs(["fit", "--trainer.max_steps", "3"])
    ['fit', '--trainer.max_steps', '3']
    """
    found: list[str] = []
    for position, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if equals and option in CONFIG_OPTIONS:
            found.append(f"{option}={find_config(value)}")
        elif position > 0 and arguments[position - 1] in CONFIG_OPTIONS:
            found.append(find_config(argument))
        else:
            found.append(argument)
    return found


def run_name(arguments: list[str]) -> str:
    """The name of a run: its first config's, or that of the run whose saved `config.yaml` it is.

    >>> run_name(["fit", "--config", "my/gsm8k.yaml", "--config", "fsdp.yaml"])
    'gsm8k'
    >>> run_name(["fit", "--config=runs/quickstart/0/config.yaml"])
    'quickstart'
    >>> run_name(["fit", "--config=runs/quickstart/slurm-71.0/config.yaml"])
    'quickstart'
    >>> run_name(["fit", "--config", "runs/quickstart/validate-2/config.yaml"])
    'quickstart'
    >>> run_name(["fit"])
    'default'
    """
    for position, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option not in CONFIG_OPTIONS or (not equals and position + 1 == len(arguments)):
            continue
        file = Path(value if equals else arguments[position + 1])
        is_saved = file.name == SAVED_CONFIG and FOLDER_NAME.fullmatch(file.parent.name) is not None
        return file.parent.parent.name if is_saved else file.stem
    return "default"


def kind_of(folder: str) -> str:
    """The command of a run, from the name of its folder. A folder that was renamed counts as a training.

    >>> kind_of("3"), kind_of("validate-1"), kind_of("eval-slurm-71.0"), kind_of("slurm-71.0-1"), kind_of("the-best")
    ('fit', 'validate', 'eval', 'fit', 'fit')
    """
    match = FOLDER_NAME.fullmatch(folder)
    return (match and match[1]) or TRAINING


def new_run_folder(root: str | Path, name: str, kind: str = TRAINING) -> Path:
    """Makes the folder of a run, one for all ranks.

    Args:
        root: Folder of the runs.
        name: Name of the config.
        kind: The command. A training gets `<root>/<name>/<n>`, the first number of which is 0; an evaluation
            `<root>/<name>/validate-<n>`, from 1. In a SLURM job, n is the job's name.

    Raises:
        ConfigError: The root cannot be written or is full, or the ranks did not agree.
    """
    from fuchsia_pl.cli.launch import agreed_folder  # imports torch

    parent = Path(root) / name
    prefix = "" if kind == TRAINING else f"{kind}-"

    def make_named(own: str) -> Path:
        # A job step may call the command again. Its first run saved this file only after all ranks had their folder.
        names = itertools.chain([own], (f"{own}-{number}" for number in itertools.count(1)))
        folder = next(parent / f"{prefix}{name}" for name in names if not _is_used(parent / f"{prefix}{name}"))
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    try:
        folder = agreed_folder(lambda: _numbered(parent, prefix), make_named)
        _try_to_write(folder)
        return folder
    except OSError as error:
        raise ConfigError(
            f"trainer.default_root_dir={str(root)!r}: the run's folder {parent}/{prefix}<n> cannot be made or written "
            f"({error.strerror}). Give a folder that can be written and has room"
        ) from error


def _try_to_write(folder: Path) -> None:
    """Writes and removes as many bytes as the first files of a run have: only a write detects missing rights, quotas or room."""
    probe = folder / f".probe-{uuid.uuid4().hex}"  # ranks in containers share the folder, and may share the process id
    try:
        probe.write_bytes(bytes(PROBE_BYTES))
    except OSError:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
            folder.rmdir()
        raise
    probe.unlink(missing_ok=True)


def nearest_existing(folder: Path) -> Path:
    """The folder itself, or the lowest one above it that exists."""
    return next((place for place in (folder, *folder.parents) if place.is_dir()), folder)


def remove_unused(folder: Path, kept: Path) -> None:
    """Removes the folder of a run that was refused before it began, and the folders above it if they are empty.

    Args:
        folder: The run folder.
        kept: The lowest folder that existed before the run had one. It stays, as do all above it.
    """
    if not folder.is_dir():
        return
    if not all(entry.name in BEFORE_A_RUN or entry.name.startswith(LOGGER_FILES) for entry in folder.iterdir()):
        return
    shutil.rmtree(folder)
    with contextlib.suppress(OSError):  # not empty
        for parent in itertools.takewhile(lambda parent: parent != kept, folder.parents):
            parent.rmdir()


def _is_used(folder: Path) -> bool:
    return (folder / SAVED_CONFIG).exists()


def _numbered(parent: Path, prefix: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    endings = [entry.name.removeprefix(prefix) for entry in parent.iterdir() if entry.name.startswith(prefix)]
    first = 1 if prefix else 0
    number = max((int(ending) + 1 for ending in endings if ending.isdecimal()), default=first)
    while True:
        folder = parent / f"{prefix}{number}"
        try:
            folder.mkdir()
        except FileExistsError:  # another run has used the number in the meantime
            number += 1
            continue
        return folder
