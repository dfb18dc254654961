"""Held-out items whose prompts are those of training items."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence

from fuchsia_pl.envs.base import Environment
from fuchsia_pl.envs.conversation import conversation
from fuchsia_pl.rollouts import preparation
from fuchsia_pl.types import ConfigError, Item, Message

logger = logging.getLogger(__name__)


def checked_shared_items(
    environment: Environment, positions: list[int], is_required: bool, warns: bool
) -> frozenset[int] | None:
    """The held-out items with the prompt of a training item, with a warning if there are any.

    Args:
        environment: It has both splits.
        positions: The held-out items that are used.
        is_required: Whether training items that cannot be read are an error.
        warns: Whether this process logs the warning.

    Returns:
        Their positions, None if there are no training items to read.

    Raises:
        ConfigError: An item has no prompt, and the check is required.
    """
    try:
        training, held_out = preparation.training_items(environment), preparation.held_out_items(environment)
        shared = shared_items(environment.messages, training, held_out, positions)
    except ConfigError as error:
        if is_required:
            raise
        logger.info("it was not checked whether held-out items have prompts of training items: %s", error)
        return None
    if shared and warns:
        logger.warning("%d of %d held-out items have the prompt of a training item", len(shared), len(positions))
    return shared


def shared_items(
    messages: Callable[[Item], list[Message]], training: Sequence[Item], held_out: Sequence[Item], positions: list[int]
) -> frozenset[int]:
    """Positions of the held-out items whose prompt is also the prompt of a training item.

    Args:
        messages: `Environment.messages`.
        training: The training items.
        held_out: The held-out items.
        positions: The held-out items that are used.

    Raises:
        ConfigError: An item has no prompt.

    >>> def prompt(item): return [{"role": "user", "content": item["question"]}]
    >>> training, held_out = [{"question": "a"}, {"question": "b"}], [{"question": "b", "n": 1}, {"question": "c"}]
    >>> sorted(shared_items(prompt, training, held_out, positions=[0, 1]))
    [0]
    """
    own = {position: _digest(messages, held_out[position]) for position in positions}
    wanted = set(own.values())
    found = {digest for index in range(len(training)) if (digest := _digest(messages, training[index])) in wanted}
    return frozenset(position for position, digest in own.items() if digest in found)


def _digest(messages: Callable[[Item], list[Message]], item: Item) -> bytes:
    text = json.dumps(conversation(messages, item), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
