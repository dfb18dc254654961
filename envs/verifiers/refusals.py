"""What of verifiers does not work here. Each is refused by name, before an engine starts."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import verifiers.v1 as vf
from verifiers.v1.configs.agent import agent_config_fields
from verifiers.v1.session import hook_boundary
from verifiers.v1.utils.decorators import discover_decorated

from fuchsia_pl.envs import ConfigError

# Settings of an agent that have an effect here, or none anywhere without a harness program.
AGENT_SETTINGS = {"harness", "max_turns", "runtime"}
CHAT = "null"  # the harness that only chats, which is what the policy does here
# Settings of every environment that have no effect here.
ENV_SETTINGS = {"timeout", "retries", "max_concurrent_agents", "interception"}
# Fields of a task that need a container, a sandbox or a harness program.
SANDBOX_FIELDS = (
    "image",
    "workdir",
    "agent_user",
    "skills",
    "network_allow",
    "network_block",
    "artifacts",
    "resources",
)
MACHINERY = ("run_episode", "run_slot", "slots", "serving", "shared_tools")


def check_env(env: vf.Env, given: set[str]) -> None:
    """Refuses an environment whose agents or settings have no counterpart here.

    Args:
        env: The environment.
        given: Names of its settings in our config.

    Raises:
        ConfigError: Names what does not work.
    """
    kind = type(env).__name__
    agents = agent_config_fields(env.config)
    if len(agents) != 1:
        raise ConfigError(_sentence(kind, f"has the agents {sorted(agents)}", "one agent, the policy, is supported"))
    if given & ENV_SETTINGS:
        raise ConfigError(_sentence(kind, f"is given {sorted(given & ENV_SETTINGS)}", "leave these out"))
    own = [name for name in MACHINERY if getattr(type(env), name) is not getattr(vf.Env, name)]
    if own:
        raise ConfigError(_sentence(kind, f"overrides {own}", "these methods are not called here"))
    ((name, config),) = agents.items()
    _check_agent(kind, name, config)
    harness = vf.default_harness_id(env.config.taskset.id)
    if config.harness is None and harness not in ("bash", CHAT):
        raise ConfigError(_sentence(kind, f"runs the harness program {harness!r}", "the policy can only chat"))


def _check_agent(kind: str, name: str, config: vf.AgentConfig) -> None:
    if config.harness is not None and config.harness.id != CHAT:
        what = f"runs the harness program {config.harness.id!r} as its agent {name!r}"
        raise ConfigError(_sentence(kind, what, f"the policy can only chat, as with {CHAT!r}"))
    plain = dict(vf.AgentConfig())
    changed = [field for field, value in config if field not in AGENT_SETTINGS and value != plain.get(field, value)]
    if changed:
        what = f"sets {changed} of its agent {name!r}"
        raise ConfigError(_sentence(kind, what, "models, sampling and limits are settings of the run"))


def check_task_type(task: vf.Task) -> None:
    """Refuses a class of tasks that needs a runtime or changes what is sent or sampled.

    Args:
        task: Any task of the class.

    Raises:
        ConfigError: Names what does not work.
    """
    kind = type(task).__name__
    if task.NEEDS_CONTAINER:
        raise ConfigError(_sentence(kind, "needs a container", "there are none here"))
    for name in _needing_runtime(task):
        raise ConfigError(_sentence(kind, f"needs a runtime in {name!r}", "there are no runtimes here"))
    if type(task).runtime_env is not vf.Task.runtime_env:
        raise ConfigError(_sentence(kind, "has a runtime_env", "there are no runtimes here"))
    intercepts = [function.__name__ for function in discover_decorated(task, "intercept")]
    if intercepts:
        raise ConfigError(_sentence(kind, f"intercepts messages in {intercepts}", "what is sampled is never changed"))
    for stop in task.hooks("stop"):
        if _boundary(kind, stop) is not vf.Trace:
            raise ConfigError(_sentence(kind, f"stops by a request or response in {stop.__name__!r}", "use the trace"))


def _needing_runtime(task: vf.Task) -> Iterator[str]:
    own = [name for name in ("setup", "finalize") if getattr(type(task), name) is not getattr(vf.Task, name)]
    scorers = [*task.hooks("metric"), *task.hooks("reward"), *(judge.score for judge in task.plugged_judges())]
    for name, function in [*((name, getattr(task, name)) for name in own), *((one.__name__, one) for one in scorers)]:
        parameter = inspect.signature(function).parameters.get("runtime")
        if parameter is not None and (name in own or parameter.default is inspect.Parameter.empty):
            yield name


def _boundary(kind: str, stop: Callable[..., Any]) -> type:
    try:
        return hook_boundary(stop, allow_trace=True)
    except (TypeError, NameError) as error:
        raise ConfigError(_sentence(kind, f"has the stop {stop.__name__!r}", str(error))) from error


def check_task(task: vf.Task) -> None:
    """Refuses a task that needs a sandbox, or a limit of time that would make a run depend on the machine.

    Args:
        task: The task.

    Raises:
        ConfigError: Names the task and what it needs.
    """
    values, plain = dict(task.data), dict(vf.TaskData())
    needed = [name for name in SANDBOX_FIELDS if values[name] != plain[name]]
    if task.data.timeout.agent is not None:
        needed.append("timeout.agent")
    if needed:
        raise ConfigError(
            _sentence(
                type(task).__name__,
                f"has {needed} in task {task.data.idx}",
                "containers and such limits are not supported",
            )
        )


def _sentence(kind: str, what: str, allowed: str) -> str:
    return f"{kind} of verifiers {what}, which does not work here: {allowed}"
