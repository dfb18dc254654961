"""Errors that a user can cause become one line: the setting, the reason, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fuchsia_pl.cli.commands import DEBUG_OPTION
from fuchsia_pl.types import ConfigError

# Errors with which libraries and users' classes refuse their settings. Anything else is a bug and keeps its traceback.
REFUSALS = (MisconfigurationException, ImportError, OSError, ValueError)

T = TypeVar("T")


@contextmanager
def refused_by(what: str) -> Iterator[None]:
    """Inside the `with` block, errors that refuse a setting are raised as ConfigError.

    Args:
        what: Subject of the error message, such as the class that is made.
    """
    try:
        yield
    except ConfigError:
        raise
    except REFUSALS as error:
        raise ConfigError(f"{what}: {one_line(error)} ({DEBUG_OPTION} shows where)") from error


def made(class_type: type[T], *args: Any, **kwargs: Any) -> T:
    """Makes an object of a config, as jsonargparse's own instantiator does; an error message contains the class."""
    with refused_by(f"{class_type.__module__}.{class_type.__qualname__} does not take its settings"):
        return class_type(*args, **kwargs)


def one_line(error: BaseException) -> str:
    r"""An error's message without line breaks, or the name of its class if it has none.

    >>> one_line(ValueError("lr is -1,\n  use more"))
    'lr is -1, use more'
    >>> one_line(OSError())
    'OSError'
    """
    return " ".join(str(error).split()) or type(error).__name__
