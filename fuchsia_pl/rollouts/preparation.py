"""Checks of an environment before sampling, at the start of a run and in `fuchsia check-env`."""

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from fuchsia_pl.envs.base import Environment
from fuchsia_pl.envs.golds import check_golds
from fuchsia_pl.envs.parts import members, reward_names
from fuchsia_pl.envs.tools.spec import ToolServerError
from fuchsia_pl.envs.user_code import StrayError, reason, user_code
from fuchsia_pl.progress import progress
from fuchsia_pl.rollouts.addressing import item_indices
from fuchsia_pl.rollouts.calls import EnvironmentStepError
from fuchsia_pl.rollouts.collector import Collector
from fuchsia_pl.rollouts.credit import OVERLONG
from fuchsia_pl.types import ConfigError, Item

logger = logging.getLogger(__name__)


def check_shares(batch_size: int, num_ranks: int, mini_batches: int) -> None:
    """Checks that the items can be divided over the ranks, and those of each rank over the mini-batches.

    Raises:
        ConfigError: They cannot.
    """
    if batch_size % num_ranks:
        raise ConfigError(
            f"data.batch_size={batch_size} is no multiple of the {num_ranks} ranks, which sample equal shares of the items"
        )
    if batch_size % (num_ranks * mini_batches):
        raise ConfigError(
            f"data.batch_size={batch_size} is no multiple of model.loss.mini_batches={mini_batches} x {num_ranks} rank(s), which "
            f"use equal shares of the items: set it to a multiple of {num_ranks * mini_batches}"
        )


def check_reward_names(environment: Environment) -> None:
    """Refuses a reward function with the name of the overlong penalty, which is listed beside the rewards.

    Raises:
        ConfigError: There is one.
    """
    for member in members(environment):
        if OVERLONG in reward_names(member):
            raise ConfigError(
                f"{type(member).__name__} has a reward function {OVERLONG!r}: the name is taken, rename the function"
            )


def training_prompts(collector: Collector, seed: int, batch_size: int) -> dict[int, int]:
    """The training items of a run.

    Args:
        collector: With a prepared environment.
        seed: The run's seed.
        batch_size: Items of a phase, over all ranks.

    Returns:
        Number of prompt tokens by position, for the items whose prompts are short enough.

    Raises:
        ConfigError: There are too few items, the template cannot render the conversation, or a prompt or a gold answer cannot
            be used.
    """
    kind = type(collector.environment).__name__
    items = training_items(collector.environment)
    if len(items) == 0:
        raise ConfigError(f"{kind}.train_items has no items: there is nothing to train on")
    item_indices(seed, 0, len(items), batch_size)
    collector.check_template(items, 0)
    prompts = collector.fitting(items, "training")
    if not prompts:
        raise ConfigError(
            f"the prompts of all {len(items)} training items are too long: raise data.sampling.max_length, or lower "
            "max_completion_tokens"
        )
    with progress.activity("checking gold answers"):
        check_golds(collector.environment, "train", items, prompts)
    item_indices(seed, 0, len(prompts), batch_size)
    return prompts


def held_out_prompts(collector: Collector, num_ranks: int) -> list[int]:
    """Positions of the held-out items whose prompts are short enough.

    Args:
        collector: With a prepared environment.
        num_ranks: Ranks that share the items.

    Raises:
        ConfigError: There are too few items, or a prompt or a gold answer cannot be used.
    """
    kind = type(collector.environment).__name__
    items = held_out_items(collector.environment)
    fitting = list(collector.fitting(items, "held-out"))
    if len(fitting) < num_ranks:
        raise ConfigError(
            f"{kind}.validation_items has {len(fitting)} items for {num_ranks} rank(s): add some, or set "
            "trainer.limit_val_batches to 0"
        )
    if len(fitting) < len(items):
        logger.warning("%d held-out items are left out: their prompts are too long", len(items) - len(fitting))
    return check_golds(collector.environment, "validation", items, fitting)


def training_items(environment: Environment) -> Sequence[Item]:
    """Result of `train_items`, see `split_items`."""
    return split_items(environment.train_items, f"{type(environment).__name__}.train_items")


def held_out_items(environment: Environment) -> Sequence[Item]:
    """Result of `validation_items`, see `split_items`."""
    return split_items(environment.validation_items, f"{type(environment).__name__}.validation_items")


def split_items(method: Callable[[], Sequence[Item]], where: str) -> Sequence[Item]:
    """The items of a split.

    Args:
        method: An environment's `train_items` or `validation_items`.
        where: Its name, for error messages.

    Raises:
        ConfigError: The method raised, or its result is not a sequence.
    """
    with as_config_error(where), user_code():
        items = method()
    is_sequence = hasattr(items, "__len__") and hasattr(items, "__getitem__")
    if not is_sequence or isinstance(items, str | bytes | Mapping):
        raise ConfigError(f"{where} returned a {type(items).__name__}: it must return a list of items, each a mapping")
    return items


@contextmanager
def as_config_error(where: str) -> Iterator[None]:
    """Raises errors of an environment's code again as one sentence with their place.

    Args:
        where: Name of the code, such as "MyEnvironment.train_items".

    Raises:
        ConfigError: The code raised.
    """
    try:
        yield
    except (ConfigError, ToolServerError):
        raise
    except EnvironmentStepError as error:  # its message contains the place
        raise ConfigError(str(error)) from error
    except Exception as error:
        raised = error.__cause__ if isinstance(error, StrayError) and error.__cause__ else error
        frame = traceback.extract_tb(raised.__traceback__)[-1]
        raise ConfigError(f"{where} raised {reason(error)} ({frame.filename}, line {frame.lineno})") from error
