"""Calls of an environment's own methods: whatever they raise is an error with their name in it."""

from collections.abc import Callable
from typing import Any

from fuchsia_pl.envs.base import Environment
from fuchsia_pl.envs.bounded import LeftThreadsError, await_bounded, call_bounded
from fuchsia_pl.envs.tools.spec import ToolServerError
from fuchsia_pl.envs.user_code import StrayError, reason
from fuchsia_pl.loop import cancel_others
from fuchsia_pl.rollouts.ahead import PhasesAhead
from fuchsia_pl.types import Rollout


class EnvironmentStepError(RuntimeError):
    """One of an environment's methods raised or hung, or `step_rollout` neither answered nor ended the interaction."""


async def prepare(environment: Environment) -> None:
    """Calls `prepare`. Its plain errors pass: they have a meaning for the start of a run.

    Raises:
        EnvironmentStepError: It raised what is no plain error, or took longer than `prepare_timeout_s`.
    """
    where, timeout_s = f"{type(environment).__name__}.prepare", environment.prepare_timeout_s
    # A plain TimeoutError of its own arrives as a StrayError.
    try:
        await await_bounded(environment.prepare(), where, timeout_s)
    except TimeoutError as error:
        raise EnvironmentStepError(f"{where} took longer than {timeout_s:g} s (prepare_timeout_s)") from error
    except StrayError as error:
        raise EnvironmentStepError(f"{where} raised {error}") from error


async def close(environment: Environment, timeout_s: float) -> None:
    """Calls `close`. Its plain errors pass.

    Args:
        environment: The environment.
        timeout_s: Bound in seconds.

    Raises:
        EnvironmentStepError: It raised what is no plain error, or took longer.
    """
    where = f"{type(environment).__name__}.close"
    try:
        await await_bounded(environment.close(), where, timeout_s)
    except TimeoutError as error:
        raise EnvironmentStepError(f"{where} took longer than {timeout_s:g} s") from error
    except StrayError as error:
        raise EnvironmentStepError(f"{where} raised {error}") from error


async def end_rollouts(environment: Environment, phases: PhasesAhead[Any] | None, timeout_s: float) -> None:
    """Cancels rollouts first and closes connections to tool servers last: tasks of their own hold these.

    Args:
        environment: The environment.
        phases: Phases that may be in progress.
        timeout_s: Bound of each part in seconds.
    """
    try:
        if phases is not None:
            await phases.cancel()
    finally:
        try:
            await close(environment, timeout_s)
        finally:
            await cancel_others(timeout_s)


async def call_method(
    environment: Environment, method: Callable[[Rollout], Any], rollout: Rollout, timeout_s: float
) -> None:
    """Calls a method that takes a rollout.

    Args:
        environment: The environment.
        method: One of its methods, sync or async.
        rollout: The rollout.
        timeout_s: Bound in seconds.

    Raises:
        EnvironmentStepError: It raised or took longer. The item is named.
        ToolServerError: A tool server cannot be started again.
        LeftThreadsError: User code leaves threads behind without end.
    """
    where = f"{type(environment).__name__}.{method.__name__} on item {rollout.item_index}"
    try:
        await call_bounded(method, rollout, timeout_s)
    except TimeoutError as error:
        raise EnvironmentStepError(f"{where} took longer than {timeout_s:g} s") from error
    except (ToolServerError, LeftThreadsError):
        raise
    except Exception as error:  # whatever an environment raises is passed on with its item
        raise EnvironmentStepError(f"{where} raised {reason(error)}") from error
