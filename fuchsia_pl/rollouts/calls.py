"""Calls of an environment's methods. Their errors are raised again with the name of the method."""

from collections.abc import Callable
from typing import Any

from fuchsia_pl.envs.base import Environment
from fuchsia_pl.envs.bounded import ENDS_RUN, await_bounded, call_bounded, call_in_thread
from fuchsia_pl.envs.tools.spec import ToolServerError
from fuchsia_pl.envs.user_code import StrayError, reason
from fuchsia_pl.loop import cancel_others
from fuchsia_pl.rollouts.ahead import PhasesAhead
from fuchsia_pl.types import Rollout


class EnvironmentStepError(RuntimeError):
    """An environment's method raised or timed out, or `step_rollout` neither responded nor finished the rollout."""


async def prepare(environment: Environment) -> None:
    """Calls `prepare`, then that of the reward functions. An `Exception` is not wrapped: it describes why a run cannot start.

    Raises:
        EnvironmentStepError: It raised another `BaseException`, or took longer than `prepare_timeout_s`.
    """
    where, timeout_s = f"{type(environment).__name__}.prepare", environment.prepare_timeout_s
    # A TimeoutError raised by the method itself arrives as a StrayError.
    try:
        await await_bounded(environment.prepare(), where, timeout_s)
        await await_bounded(call_in_thread(environment.prepare_rewards, timeout_s=timeout_s), where, timeout_s)
    except TimeoutError as error:
        raise EnvironmentStepError(f"{where} took longer than {timeout_s:g} s (prepare_timeout_s)") from error
    except StrayError as error:
        raise EnvironmentStepError(f"{where} raised {error}") from error


async def close(environment: Environment, timeout_s: float) -> None:
    """Calls `close`. An `Exception` from it is not wrapped.

    Args:
        environment: The environment.
        timeout_s: Bound in seconds.

    Raises:
        EnvironmentStepError: It raised another `BaseException`, or took longer.
    """
    where = f"{type(environment).__name__}.close"
    try:
        await await_bounded(environment.close(), where, timeout_s)
    except TimeoutError as error:
        raise EnvironmentStepError(f"{where} took longer than {timeout_s:g} s") from error
    except StrayError as error:
        raise EnvironmentStepError(f"{where} raised {error}") from error


async def end_rollouts(environment: Environment, phases: PhasesAhead[Any] | None, timeout_s: float) -> None:
    """Cancels rollouts first and closes connections to tool servers last: separate tasks own these connections.

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
    """Calls a method with a rollout.

    Args:
        environment: The environment.
        method: A method of the environment, sync or async.
        rollout: The rollout.
        timeout_s: Bound in seconds.

    Raises:
        EnvironmentStepError: It raised or took longer. The message names the item.
        ToolServerError: A tool server cannot be started again.
        LeftThreadsError: User code leaves too many threads behind.
        RunEndingConfigError: The method raised it.
    """
    where = f"{type(environment).__name__}.{method.__name__} on item {rollout.item_index}"
    try:
        await call_bounded(method, rollout, timeout_s)
    except TimeoutError as error:
        raise EnvironmentStepError(f"{where} took longer than {timeout_s:g} s") from error
    except (ToolServerError, *ENDS_RUN):
        raise
    except Exception as error:  # user code may raise anything
        raise EnvironmentStepError(f"{where} raised {reason(error)}") from error
