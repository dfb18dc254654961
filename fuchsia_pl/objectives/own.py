"""Functions that a user writes and names by a dotted path: import, signature, and shape of the result."""

import functools
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fuchsia_pl.types import ConfigError


def is_own(name: str) -> bool:
    """Whether a setting is a dotted path and not the name of a function of this package.

    >>> is_own("group_norm"), is_own("my_module.my_advantage")
    (False, True)
    """
    return "." in name


def import_function(setting: str, path: str, parameters: Sequence[str]) -> Callable[..., Any]:
    """Imports a function. A SystemExit of its module or of a call is an error, and never the exit code of the run.

    Args:
        setting: The setting that contains the path, for errors.
        path: Its dotted path. Modules are looked up as Python does, in the working directory too.
        parameters: Names of the positional arguments that it is called with.

    Raises:
        ConfigError: It cannot be imported or called with these arguments.

    >>> import_function("model.loss.surrogate", "math.sqrt", ("inputs",))(4.0)
    2.0
    """
    try:
        function = pkgutil.resolve_name(path)
    except (Exception, SystemExit) as error:  # the module of a user may raise anything
        raise ConfigError(
            f'{setting} "{path}" cannot be imported: {type(error).__name__}: {error}. It is the dotted path of a function, and '
            "its module must be in the working directory or installed"
        ) from error
    if not callable(function):
        raise ConfigError(f'{setting} "{path}" is of type {type(function).__name__}: it must be a function')
    try:
        inspect.signature(function).bind(*parameters)
    except (TypeError, ValueError) as error:  # ValueError: a builtin without a signature
        raise ConfigError(f'{setting} "{path}" must take ({", ".join(parameters)}): {error}') from error

    @functools.wraps(function)
    def called(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except SystemExit as end:
            raise wrong_result(setting, path, f"raised SystemExit: {end}") from end

    return called


def check_tensor(setting: str, path: str, what: str, value: Any, shape: torch.Size, is_bool: bool = False) -> Tensor:
    """Returns a result of a user's function.

    Raises:
        ConfigError: It is not a tensor of this shape and kind.
    """
    wanted = f"a {'bool' if is_bool else 'float'} tensor of shape {list(shape)}"
    if not isinstance(value, Tensor):
        raise wrong_result(setting, path, f"returned a {type(value).__name__} as {what}: it must be {wanted}")
    is_right_kind = value.dtype is torch.bool if is_bool else value.is_floating_point()
    if value.shape != shape or not is_right_kind:
        got = f"{value.dtype} {list(value.shape)}"
        raise wrong_result(setting, path, f"returned {what} of {got}: it must be {wanted}")
    return value


def wrong_result(setting: str, path: str, fault: str) -> ConfigError:
    """The error for a user's function with a wrong result.

    >>> str(wrong_result("model.loss.surrogate", "my_module.my_loss", "returned None"))
    'model.loss.surrogate "my_module.my_loss" returned None'
    """
    return ConfigError(f'{setting} "{path}" {" ".join(fault.split())}')
