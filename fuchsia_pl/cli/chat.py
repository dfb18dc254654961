"""`fuchsia chat`: a conversation with a trained adapter, a model or both in the terminal, with the tools of a config."""

import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from fuchsia_pl.cli.chat_session import HELP, ChatSettings, Session, conversation_environment
from fuchsia_pl.cli.config_only import ConfigOnlyCLI
from fuchsia_pl.cli.find_run import RunNotFoundError
from fuchsia_pl.cli.options import chat_options
from fuchsia_pl.cli.run_folder import SAVED_CONFIG
from fuchsia_pl.cli.trained import find_weights
from fuchsia_pl.envs.base import Environment
from fuchsia_pl.policy.adapter_files import ADAPTER_CONFIG, read_adapter_config
from fuchsia_pl.policy.cpu import has_bfloat16
from fuchsia_pl.policy.local_engine import LocalEngine
from fuchsia_pl.policy.sources import ModelNotFoundError, resolve_model
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.types import ConfigError


@dataclass(frozen=True)
class Target:
    """What a conversation is with.

    Attributes:
        model: Name of the model.
        adapter: Folder of the adapter; None for the model alone.
        config: Config with the environment; None without tools.
        label: What the user sees.
    """

    model: str | None
    adapter: Path | None
    config: str | None
    label: str


class ChatCLI(ConfigOnlyCLI):
    """Reads the model and the environment of a config."""

    def use_config(self) -> None:
        """Nothing: `chat` reads `model` and `datamodule`."""


def find_target(given: str, config: str | None) -> Target:
    """Finds a run, an adapter folder or a model, in this order.

    Args:
        given: What the user wrote.
        config: `--config`; None without it.

    Raises:
        ConfigError: It is a run without trained weights yet, or an adapter without a base.
    """
    try:
        weights, run = find_weights(given)
    except RunNotFoundError:
        return Target(given, None, config, given)
    label = given if run is None else str(run)
    config = config or (None if run is None else str(run / SAVED_CONFIG))
    if not (weights / ADAPTER_CONFIG).is_file():
        return Target(str(weights), None, config, label)  # all weights were trained
    base = None if config else read_adapter_config(weights).get("base_model_name_or_path")
    if not (config or base):
        raise ConfigError(f"the adapter in {given} does not name its base model: give --config of its run")
    return Target(base, weights, config, label)


def made_session(target: Target, settings: ChatSettings, console: Console) -> Session:
    """Loads the model, and the environment if there is a config.

    Raises:
        ConfigError: The config, the model or the adapter cannot be used.
    """
    environment: Environment | None = None
    name, dtype, template = target.model, "bfloat16", None
    if target.config is not None:
        cli = ChatCLI(["fit", "--config", target.config])
        served = cli.model.learner.served_model
        environment, dtype, template = cli.datamodule.environment, served.dtype, served.chat_template
        name = name or served.name
    assert name is not None, "a target without a model has a config"
    if not torch.cuda.is_available() and dtype == "bfloat16" and not has_bfloat16(torch.cpu.get_capabilities()):
        dtype = "float32"
    disable_progress_bar()
    try:
        folder = resolve_model(name)
    except ModelNotFoundError as error:
        raise ConfigError(f"{target.label!r} is neither a run, nor an adapter, nor a model: {error}") from error
    chat = Chat(folder, template)
    engine = LocalEngine(folder, getattr(torch, dtype), target.adapter, name)
    engine.read_stop_strings_with(chat.tokenizer)
    with_adapter = f" with the adapter of {target.label}" if target.adapter else ""
    session = Session(engine, chat, conversation_environment(environment), settings, console)
    console.print(Text(f"{name}{with_adapter}, on {engine.device} in {dtype}", style="dim"), soft_wrap=True)
    return session


def lines(console: Console) -> Iterator[str]:
    """The user's lines: with a prompt on a terminal, else from standard input."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    while True:
        try:
            yield console.input("[bold]> [/bold]")
        except EOFError:
            return


def chat(arguments: list[str]) -> int:
    """Runs `fuchsia chat`; returns the exit code."""
    parser = chat_options()
    given = parser.parse_args(arguments)
    console = Console(highlight=False)
    try:
        settings = ChatSettings(given.temperature, given.max_tokens, given.seed)
        session = made_session(find_target(given.target, given.config), settings, console)
    except ConfigError as error:
        parser.error(str(error))
    if given.system:
        session.messages = [{"role": "system", "content": given.system}]
    try:
        _converse(session, lines(console), is_terminal=sys.stdin.isatty())
    except ConfigError as error:
        parser.error(str(error))
    return 0


def _converse(session: Session, user_lines: Iterator[str], is_terminal: bool) -> None:
    with session.open():
        tools = ", ".join(tool.name for tool in session.environment.tools)
        told = [f"tools: {tools}"] if tools else []
        if is_terminal:
            told.append(HELP)
        for text in told:
            session.console.print(Text(text, style="dim"), soft_wrap=True)
        for line in user_lines:
            if not session.take(line):
                return
