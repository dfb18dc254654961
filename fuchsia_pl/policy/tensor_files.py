"""Reads names and shapes from tensor files, and compares them with the expected ones."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fuchsia_pl.types import ConfigError

Shapes = Mapping[str, tuple[int, ...]]


def shapes_in_file(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a `.safetensors` file or one written by `torch.save`. No code in it is run.

    Raises:
        ConfigError: The file is missing, cut off or of another kind.
    """
    try:
        if file.suffix == ".safetensors":
            # Opening compares the length of the file with its header.
            with safe_open(str(file), framework="pt") as opened:
                return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    except SafetensorError as error:
        raise ConfigError(f"the file {file} is broken or cut off ({error}): copy or save it again") from error
    except Exception as error:  # a file of unknown origin can make the unpickler raise any exception
        reason = str(error).partition("\n")[0][:120]
        raise ConfigError(
            f"the file {file} is broken, cut off or not a file of tensors ({type(error).__name__}: {reason}): copy or save it "
            "again"
        ) from error


def first_difference(expected: Shapes, found: Shapes) -> str | None:
    """The first name missing on each side, and the first with another shape; None if both sides are equal.

    >>> first_difference({"a": (2,), "b": (3,)}, {"b": (4,), "c": (2,)})
    'a is missing (1 of 2), c is unexpected (1 of 2), b has shape (4,) instead of (3,)'
    >>> first_difference({"a": (2,)}, {"a": (2,)}) is None
    True
    """
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    reshaped = sorted(name for name in expected.keys() & found.keys() if tuple(expected[name]) != tuple(found[name]))
    words = []
    if missing:
        words.append(f"{missing[0]} is missing ({len(missing)} of {len(expected)})")
    if extra:
        words.append(f"{extra[0]} is unexpected ({len(extra)} of {len(found)})")
    if reshaped:
        name = reshaped[0]
        words.append(f"{name} has shape {tuple(found[name])} instead of {tuple(expected[name])}")
    return ", ".join(words) or None
