"""Agents: a Python function, or a command in a process of its own."""

import asyncio
import copy
import inspect
import json
import logging
import os
import pkgutil
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from fuchsia_pl.envs.bounded import await_bounded, call_in_thread, check_left_threads
from fuchsia_pl.loop import LoopThread, cancel_others
from fuchsia_pl.scratch import OWNER_VARIABLE
from fuchsia_pl.types import ConfigError, Item, shortened

logger = logging.getLogger(__name__)

ARGUMENTS = ("item", "base_url", "api_key")
# Variables that a command inherits. Keys and tokens of the run's user are not among them.
INHERITED = (
    "HOME",
    "LANG",
    "LC_ALL",
    "LOGNAME",
    "PATH",
    "PYTHONPATH",
    "SHELL",
    "TERM",
    "TMPDIR",
    "USER",
    "VIRTUAL_ENV",
)
MAX_OUTPUT_BYTES = 1 << 20  # of a command; the rest is read and dropped
MAX_ERROR_CHARS = 1000
GRACE_S = 5.0
STOP_TIMEOUT_S = 10.0


class AgentError(RuntimeError):
    """The agent's code failed."""


@dataclass(frozen=True)
class Access:
    """What an agent needs to reach the policy.

    Attributes:
        base_url: Address of the endpoint, with `/v1`.
        api_key: Key of the rollout.
        timeout_s: Time limit of the agent in seconds.

    >>> Access("http://127.0.0.1:8000/v1", "key", timeout_s=60.0).variables
    {'OPENAI_BASE_URL': 'http://127.0.0.1:8000/v1', 'OPENAI_API_KEY': 'key'}
    """

    base_url: str
    api_key: str
    timeout_s: float

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables that OpenAI's clients read."""
        return {"OPENAI_BASE_URL": self.base_url, "OPENAI_API_KEY": self.api_key}


class Agent(ABC):
    """Code that solves an item with an OpenAI client."""

    @abstractmethod
    async def run(self, item: Item, access: Access) -> Any:
        """Runs the agent once and returns its result. A cancellation ends it.

        Raises:
            Exception: The agent failed.
        """

    async def close(self) -> None:
        """Releases what all runs share."""


class EntryAgent(Agent):
    """A Python function `run(item, base_url, api_key)`, sync or async.

    A sync function runs in a thread of its own. Async ones share an event loop, which is not that of the rollouts: one that
    blocks without an `await` blocks the other agents. A thread cannot be ended: use a command for an agent that may hang.

    Args:
        entry: "module:function".

    Raises:
        ConfigError: It cannot be imported or called with these arguments.
    """

    def __init__(self, entry: str) -> None:
        self._function = imported("entry", entry, ARGUMENTS)
        self._name = entry
        self._loop: LoopThread | None = None

    async def run(self, item: Item, access: Access) -> Any:
        """Calls the function; see `Agent.run`."""
        check_left_threads()
        call = partial(self._function, copy.deepcopy(dict(item)), access.base_url, access.api_key)
        limit = access.timeout_s
        if not inspect.iscoroutinefunction(self._function):
            result = await await_bounded(call_in_thread(call, timeout_s=limit), self._name, limit)
            if inspect.isawaitable(result):
                raise AgentError(f"{self._name} returns an awaitable that nothing awaits: declare it with `async def`")
            return result
        self._loop = self._loop or LoopThread("agents")
        return await self._loop.call(await_bounded(call(), self._name, limit), limit + GRACE_S)

    async def close(self) -> None:
        """Stops the event loop of async functions."""
        loop, self._loop = self._loop, None
        if loop is not None:
            try:
                await loop.call(cancel_others(GRACE_S), STOP_TIMEOUT_S)
            except TimeoutError:
                logger.warning("the async agent %s still blocks its event loop, which is left", self._name)
            await asyncio.get_running_loop().run_in_executor(None, loop.stop, STOP_TIMEOUT_S)


class CommandAgent(Agent):
    """A program. It reads the item as JSON from its standard input, and its standard output is its result.

    It finds the endpoint in OPENAI_BASE_URL and OPENAI_API_KEY. Its process group is killed at the end.

    Args:
        command: Program and arguments.
        variables: Further environment variables.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        self._command = list(command)
        self._variables = dict(variables)

    async def run(self, item: Item, access: Access) -> str:
        """Runs the program; see `Agent.run`."""
        inherited = {name: os.environ[name] for name in (*INHERITED, OWNER_VARIABLE) if name in os.environ}
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env={**inherited, **self._variables, **access.variables},
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(access.timeout_s):
                out, err = await _exchange(process, json.dumps(dict(item), default=str).encode())
                status = await process.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), GRACE_S)
        if status != 0:
            raise AgentError(
                f"{self._command[0]} ended with status {status}: {shortened(err.strip(), MAX_ERROR_CHARS)}"
            )
        return out


async def _exchange(process: asyncio.subprocess.Process, given: bytes) -> tuple[str, str]:
    """Writes the input of a process and reads its outputs until it closes them."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None

    async def write(stdin: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):  # it need not read its input
            stdin.write(given)
            await stdin.drain()
            stdin.close()

    _, out, err = await asyncio.gather(write(process.stdin), _bounded(process.stdout), _bounded(process.stderr))
    return out.decode(errors="replace"), err.decode(errors="replace")


async def _bounded(stream: asyncio.StreamReader) -> bytes:
    """The last bytes of a stream."""
    kept = bytearray()
    while part := await stream.read(1 << 16):
        kept += part
        del kept[:-MAX_OUTPUT_BYTES]
    return bytes(kept)


def imported(setting: str, path: str, parameters: Sequence[str]) -> Callable[..., Any]:
    """Imports a function by "module:function".

    Args:
        setting: Name of the setting, for errors.
        path: The path.
        parameters: Names of the arguments that it is called with.

    Raises:
        ConfigError: It cannot be imported or called with these arguments.

    >>> imported("entry", "math:sqrt", ("x",))(4.0)
    2.0
    """
    where = f"AgentEnvironment.{setting} {path!r}"
    if ":" not in path:
        raise ConfigError(f'{where} must have the form "module:function"')
    try:
        function = pkgutil.resolve_name(path)
    except (Exception, SystemExit) as error:  # the module of a user may raise anything
        raise ConfigError(
            f"{where} cannot be imported: {type(error).__name__}: {error}. Its module must be in the "
            "working directory or installed"
        ) from error
    if not callable(function):
        raise ConfigError(f"{where} is of type {type(function).__name__}: it must be a function")
    try:
        inspect.signature(function).bind(*parameters)
    except (TypeError, ValueError) as error:  # ValueError: a builtin without a signature
        raise ConfigError(f"{where} must take ({', '.join(parameters)}): {error}") from error
    return function
