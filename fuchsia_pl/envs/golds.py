"""Detects gold answers that a reward function cannot use, before training starts."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fuchsia_pl.envs.base import CHECK_GOLD, Environment
from fuchsia_pl.envs.rows import place_of
from fuchsia_pl.envs.user_code import reason, user_code
from fuchsia_pl.types import ConfigError, Item

NUM_THREADS = 4  # checks that wait for worker processes run concurrently
MAX_FOUND = 20  # bounds the total time if every check exceeds its time limit
SHOWN = 3
F = TypeVar("F")


def checks_gold(check: Callable[[Item], str | None]) -> Callable[[F], F]:
    """Decorator that sets the `check_gold` of a reward function, which `Environment.check_gold` calls.

    Args:
        check: Describes the fault of an item's gold answer; returns None if the reward function can use it.

    >>> @checks_gold(lambda item: None if item["answer"] else "there is no answer")
    ... def correct(rollouts, *args, **kwargs): ...
    >>> correct.check_gold({"answer": ""})
    'there is no answer'
    """

    def mark(function: F) -> F:
        setattr(function, CHECK_GOLD, check)
        return function

    return mark


def bad_golds(
    environment: Environment, items: Sequence[Item], limit: int = SHOWN, indices: Iterable[int] | None = None
) -> list[str]:
    """Faults of the gold answers of some items, one sentence each; [] if all can be used.

    Args:
        environment: Its `check_gold` is called for each item, from several threads.
        items: A split.
        limit: Maximum number of items to name. If more are unusable, a final sentence contains their number.
        indices: Positions of the items to check; None for all.
    """
    positions = list(range(len(items)) if indices is None else indices)
    found: list[tuple[int, str]] = []

    def check(part: list[int]) -> None:
        for index in part:
            if len(found) >= MAX_FOUND:
                return
            problem = _problem(environment, items[index])
            if problem is not None:
                found.append((index, problem))

    with ThreadPoolExecutor(max_workers=NUM_THREADS) as threads:
        list(threads.map(check, [positions[start::NUM_THREADS] for start in range(NUM_THREADS)]))
    shown = [f"{place_of(items, index)}: {problem}" for index, problem in sorted(found)[:limit]]
    at_least = "at least " if len(found) >= MAX_FOUND else ""
    total = f"{at_least}{len(found)} of {len(positions)} items have a gold answer that cannot be used"
    return [*shown, total] if len(found) > limit else shown


def check_golds(environment: Environment, split: str, items: Sequence[Item], indices: Iterable[int]) -> list[int]:
    """Rejects a split with a gold answer that would end the run later.

    Args:
        environment: The environment.
        split: Name of the split for the message, "train" or "validation".
        items: The split.
        indices: Positions of the items that are used.

    Returns:
        These positions.

    Raises:
        ConfigError: A gold answer cannot be used. The message names the first such items and their total number.
    """
    used = list(indices)
    problems = bad_golds(environment, items, indices=used)
    if problems:
        raise ConfigError(
            f"{type(environment).__name__} has gold answers in its {split} items that its rewards cannot use: "
            f"{'; '.join(problems)}. Correct or remove these items, or use a reward function that can read them"
        )
    return used


def _problem(environment: Environment, item: Item) -> str | None:
    try:
        with user_code():
            return environment.check_gold(item)
    except KeyError as error:
        return f"there is no field {error}"
    except Exception as error:  # user code: any exception counts as a fault of the item
        return f"the check of its gold answer raised {reason(error)}"
