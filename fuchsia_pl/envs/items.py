"""Items from the hub or from a local file."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from fuchsia_pl.types import ConfigError, Item


def load_items(
    kind: str, split: str, file: str | None, dataset: str | None, config: str | None, part: str
) -> Sequence[Item]:
    """Rows of a local file of JSON lines, else of a dataset on the hub.

    Args:
        kind: Name of the environment, for messages.
        split: "train" or "validation", for messages.
        file: Path of the local file.
        dataset: Name on the hub.
        config: The hub dataset's configuration.
        part: The hub dataset's split.

    Raises:
        ConfigError: Neither is given, or it cannot be read.
    """
    if file is None and dataset is None:
        raise ConfigError(
            f"{kind} has no {split} items: set data.environment.init_args.{split}_file or .dataset, or override "
            f"{split}_items()"
        )
    from datasets import load_dataset

    if file is not None and not Path(file).is_file():
        raise ConfigError(f"data.environment.init_args.{split}_file: there is no file {str(Path(file).absolute())!r}")
    what = file if file is not None else f"{dataset} ({config or 'default'}, split {part})"
    try:
        if file is not None:
            rows = load_dataset("json", data_files=file, split="train")
        else:
            rows = load_dataset(dataset, config, split=part)
    except Exception as error:  # the loaders of `datasets` raise anything; all of it is about what the user named
        raise ConfigError(
            f"{kind}: {split} items could not be read from {what} ({type(error).__name__}: {error}). A local file holds one "
            "JSON object a line; a dataset on the hub needs the network, or its cache"
        ) from error
    if len(rows) == 0:
        raise ConfigError(f"{kind}: {what} has no {split} items")
    return cast(Sequence[Item], rows)
