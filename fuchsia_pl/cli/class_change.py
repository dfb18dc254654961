"""A class that replaces another class in a config starts from its own defaults.

jsonargparse keeps every argument of the old class if the new class has one of the same name. So `--model.optimizer
torch.optim.SGD` over a config of AdamW would use AdamW's learning rate and weight decay.
"""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import Namespace, _typehints
from jsonargparse._util import import_object

logger = logging.getLogger(__name__)


@contextmanager
def fresh_arguments() -> Iterator[None]:
    """Inside the `with` block, parsers drop all arguments of a class that is replaced, and a warning names them.

    The patched function is the only place where jsonargparse chooses the arguments that stay, for configs and command lines.
    jsonargparse has no setting for it.
    """
    original = _typehints.discard_init_args_on_class_path_change
    _typehints.discard_init_args_on_class_path_change = _drop_all
    try:
        yield
    finally:
        _typehints.discard_init_args_on_class_path_change = original


def _drop_all(parser_or_action: Any, previous: Any, value: Any) -> None:
    """Replaces jsonargparse's function with the same arguments; changes `previous` in place, as that function does."""
    if not previous or "init_args" not in previous or previous["class_path"] in (None, value["class_path"]):
        return
    arguments = previous["init_args"]
    items = arguments.items(branches=True, nested=False) if isinstance(arguments, Namespace) else arguments.items()
    dropped = dict(items)
    for name in dropped:
        arguments.pop(name)
    listed = ", ".join(f"{name}={given}" for name, given in dropped.items() if not _is_default(previous, name, given))
    if listed:
        logger.warning(
            "%s replaces %s, whose settings are dropped: %s",
            value["class_path"],
            previous["class_path"],
            listed,
        )


def _is_default(previous: Any, name: str, given: Any) -> bool:
    """Whether a value is the default of the class, which parsers fill in."""
    parameter = inspect.signature(import_object(previous["class_path"])).parameters.get(name)
    return parameter is not None and parameter.default == given
