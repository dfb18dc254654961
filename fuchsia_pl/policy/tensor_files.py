"""What tensor files hold, from their headers, and whether that is what is expected."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fuchsia_pl.types import ConfigError

Shapes = Mapping[str, tuple[int, ...]]


def shapes_in_file(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a `.safetensors` file, or of one that `torch.save` wrote. No code in it is run.

    Raises:
        ConfigError: The file is missing, cut off or of another kind.
    """
    try:
        if file.suffix == ".safetensors":
            # It compares the length of the file with what its header promises.
            with safe_open(str(file), framework="pt") as opened:
                return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    except SafetensorError as error:
        raise ConfigError(f"the file {file} is broken or cut off ({error}): copy or save it again") from error
    except Exception as error:  # a file of unknown origin: the unpickler fails in whatever way its bytes lead to
        reason = str(error).partition("\n")[0][:120]
        raise ConfigError(
            f"the file {file} is broken, cut off or no file of tensors ({type(error).__name__}: {reason}): copy or save it again"
        ) from error


def first_difference(expected: Shapes, found: Shapes) -> str | None:
    """The first name on each side that the other lacks, and the first with another shape; None where both are alike.

    >>> first_difference({"a": (2,), "b": (3,)}, {"b": (4,), "c": (2,)})
    'a is expected and missing (1 of 2), c is found and has no place (1 of 2), b is (4,) and should be (3,)'
    >>> first_difference({"a": (2,)}, {"a": (2,)}) is None
    True
    """
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    reshaped = sorted(name for name in expected.keys() & found.keys() if tuple(expected[name]) != tuple(found[name]))
    words = []
    if missing:
        words.append(f"{missing[0]} is expected and missing ({len(missing)} of {len(expected)})")
    if extra:
        words.append(f"{extra[0]} is found and has no place ({len(extra)} of {len(found)})")
    if reshaped:
        name = reshaped[0]
        words.append(f"{name} is {tuple(found[name])} and should be {tuple(expected[name])}")
    return ", ".join(words) or None
