"""Finds the folder of a run by the name that a user gives."""

from pathlib import Path

from fuchsia_pl.cli.run_folder import DEFAULT_ROOT, FOLDER_NAME, SAVED_CONFIG, TRAINING, kind_of
from fuchsia_pl.types import ConfigError


class RunNotFoundError(ConfigError):
    """No run has that name."""


def find_run(given: str, root: str | Path = DEFAULT_ROOT) -> Path:
    """The folder of a run: a path, `NAME/N` under the root, or `NAME` for the newest training of that config.

    Args:
        given: What the user wrote.
        root: Folder of the runs, `trainer.default_root_dir`.

    Raises:
        RunNotFoundError: There is no such run. The message lists those that exist.
    """
    for folder in (Path(given), Path(root) / given):
        if (folder / SAVED_CONFIG).is_file():
            return folder
    for parent in (Path(given), Path(root) / given):
        newest = _newest_training(parent)
        if newest is not None:
            return newest
    names = sorted(f"{path.parent.parent.name}/{path.parent.name}" for path in Path(root).glob(f"*/*/{SAVED_CONFIG}"))
    existing = f"the runs there are: {', '.join(names)}" if names else "there are none"
    raise RunNotFoundError(
        f"{given!r} is no run: neither that folder nor one of that name under {root}/ has a {SAVED_CONFIG}; {existing}. Give "
        "the path of a run folder, such as runs/quickstart/0"
    )


def _newest_training(parent: Path) -> Path | None:
    """The training with the highest number, or the newest of SLURM jobs if none has a number."""
    folders = [path.parent for path in parent.glob(f"*/{SAVED_CONFIG}") if FOLDER_NAME.fullmatch(path.parent.name)]
    trainings = [folder for folder in folders if kind_of(folder.name) == TRAINING]
    numbered = [folder for folder in trainings if folder.name.isdecimal()]
    if numbered:
        return max(numbered, key=lambda folder: int(folder.name))
    return max(trainings, key=lambda folder: (folder / SAVED_CONFIG).stat().st_mtime, default=None)
