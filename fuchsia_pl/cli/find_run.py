"""Finds the folder of a run by the name that a user gives."""

from pathlib import Path

from fuchsia_pl.cli.run_folder import DEFAULT_ROOT, SAVED_CONFIG
from fuchsia_pl.types import ConfigError


def find_run(given: str, root: str | Path = DEFAULT_ROOT) -> Path:
    """The folder of a run: a path, `NAME/N` under the root, or `NAME` for the newest training of that config.

    Args:
        given: What the user wrote.
        root: Folder of the runs, `trainer.default_root_dir`.

    Raises:
        ConfigError: There is no such run. The message lists those that exist.
    """
    for folder in (Path(given), Path(root) / given):
        if (folder / SAVED_CONFIG).is_file():
            return folder
    for parent in (Path(given), Path(root) / given):
        numbers = [int(path.parent.name) for path in parent.glob(f"*/{SAVED_CONFIG}") if path.parent.name.isdigit()]
        if numbers:
            return parent / str(max(numbers))
    names = sorted(f"{path.parent.parent.name}/{path.parent.name}" for path in Path(root).glob(f"*/*/{SAVED_CONFIG}"))
    existing = f"the runs there are: {', '.join(names)}" if names else "there are none"
    raise ConfigError(
        f"{given!r} is no run: neither that folder nor one of that name under {root}/ has a {SAVED_CONFIG}; {existing}. Give "
        "the path of a run folder, such as runs/quickstart/0"
    )
