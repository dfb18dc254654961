"""A class that takes another's place in a config starts from its own defaults.

jsonargparse keeps every argument of the old class that the new one knows by name too, so `--model.optimizer torch.optim.SGD` over
a config of AdamW would go on with AdamW's learning rate and weight decay.
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
    """Inside the `with` block, parsers drop all arguments of a class whose place another takes, and a warning names them.

    The function that is replaced is the one place in which jsonargparse decides what stays, for configs and command lines alike;
    no setting of it reaches that decision.
    """
    original = _typehints.discard_init_args_on_class_path_change
    _typehints.discard_init_args_on_class_path_change = _drop_all
    try:
        yield
    finally:
        _typehints.discard_init_args_on_class_path_change = original


def _drop_all(parser_or_action: Any, previous: Any, value: Any) -> None:
    """Takes the place of jsonargparse's function of the same arguments; changes `previous` in place, as that one does."""
    if not previous or "init_args" not in previous or previous["class_path"] in (None, value["class_path"]):
        return
    arguments = previous["init_args"]
    items = arguments.items(branches=True, nested=False) if isinstance(arguments, Namespace) else arguments.items()
    dropped = dict(items)
    for name in dropped:
        arguments.pop(name)
    told = ", ".join(f"{name}={given}" for name, given in dropped.items() if not _is_default(previous, name, given))
    if told:
        logger.warning(
            "%s takes the place of %s, so what was set of the latter does not count: %s",
            value["class_path"],
            previous["class_path"],
            told,
        )


def _is_default(previous: Any, name: str, given: Any) -> bool:
    """Whether a value is the class's own, which parsers fill in."""
    parameter = inspect.signature(import_object(previous["class_path"])).parameters.get(name)
    return parameter is not None and parameter.default == given
