"""`fuchsia serve --config`: starts the stock vLLM OpenAI server for a training (`serve_run` serves a finished one).

Model, type, longest completion, rank of the adapter and seed are those of the run. Memory and parallelism are those of the
config's VLLMColocatedEngine, or its defaults if the config has another engine.
"""

import errno
import ipaddress
import logging
import os
import socket
import sys
from argparse import Namespace
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from lightning.pytorch.cli import ArgsType

from fuchsia_pl import orphans
from fuchsia_pl.cli.config_only import ConfigOnlyCLI
from fuchsia_pl.cli.options import serve_config_options
from fuchsia_pl.cli.run_folder import CONFIG_OPTIONS
from fuchsia_pl.datamodule import RolloutDataModule
from fuchsia_pl.engines.vllm_arguments import (
    NUM_SERVED_ADAPTERS,
    OVERRIDING_VARIABLE,
    VLLM_ENVIRONMENT,
    VLLMSettings,
    as_options,
    check_quantization,
    vllm_arguments,
)
from fuchsia_pl.engines.vllm_colocated import WORKER_EXTENSION, VLLMColocatedEngine
from fuchsia_pl.engines.vllm_guard import API_KEY_VARIABLE, KeyGuard
from fuchsia_pl.engines.vllm_kv_cache import kv_cache_gb
from fuchsia_pl.engines.vllm_processes import socket_environment
from fuchsia_pl.engines.vllm_server import VLLMServerEngine
from fuchsia_pl.scratch import remove_left_behind, scratch_folder
from fuchsia_pl.types import ConfigError

# The `vllm` command of the CPU build does not start: it reads the metadata of a package of that name, which is not installed.
SERVER_MODULE = "vllm.entrypoints.openai.api_server"
ADAPTER_ARGUMENTS = {"enable_lora": True, "max_loras": NUM_SERVED_ADAPTERS}
# Requests that the trainer sends every few seconds, or after each completion, are not logged.
QUIET_ENDPOINTS = "/health,/v1/models,/weight_info"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerCommand:
    """Command line and environment of the server.

    Attributes:
        words: The command line.
        environment: All environment variables. They contain the API key, since all users of the machine can see the words.

    >>> ServerCommand(["python", "-m", "x"], {"PATH": "/bin"}).words[2]
    'x'
    """

    words: list[str]
    environment: dict[str, str]


@dataclass(frozen=True)
class Listener:
    """Address of the server, and the requests that it accepts.

    Attributes:
        host: Address.
        port: Port.
        api_key: Key that requests must contain; None uses that of the config's server engine or of the environment, if any.
        allow_open: Whether requests of other machines are accepted without a key.

    >>> Listener("127.0.0.1", 8000).api_key is None
    True
    """

    host: str
    port: int
    api_key: str | None = None
    allow_open: bool = False


class ServeCLI(ConfigOnlyCLI):
    """Reads the configs and then becomes the server."""

    def __init__(self, args: ArgsType, listener: Listener) -> None:
        self.listener = listener
        super().__init__(args)

    def use_config(self) -> None:
        """Replaces this process by the server, which inherits the terminal and its signals and sets the exit code."""
        orphans.watch()  # continues after this process has become the server
        remove_left_behind()
        become(server_command(self.datamodule, self.listener))


def become(command: ServerCommand) -> NoReturn:
    """Replaces this process by a server."""
    sys.stdout.flush()
    sys.stderr.flush()
    scratch = scratch_folder("vllm")  # removed when the server has ended
    environment = {**command.environment, **socket_environment(scratch)}
    os.execve(command.words[0], command.words, environment)


def server_command(data: RolloutDataModule, listener: Listener) -> ServerCommand:
    """The command that starts a server for a run.

    Raises:
        ConfigError: A setting does not work on this machine, or the server would be open to others.
    """
    engine = data.engine if isinstance(data.engine, VLLMColocatedEngine) else VLLMColocatedEngine()
    model, settings, length = data.served_model, engine.settings, data.sampling.max_length
    check_quantization(settings)
    own = ADAPTER_ARGUMENTS if model.lora_rank else transfer_arguments(settings)
    # The server has its devices for itself: nothing is reserved for a trainer.
    size = kv_cache_gb(settings, model, length, served_rank=model.lora_rank)
    arguments = {
        **vllm_arguments(settings, model, length, data.seed, size),
        **own,
        "host": listener.host,
        "port": listener.port,
        "disable_access_log_for_endpoints": QUIET_ENDPOINTS,
    }
    opened = "VLLM_ALLOW_RUNTIME_LORA_UPDATING" if model.lora_rank else "VLLM_SERVER_DEV_MODE"
    environment = {**VLLM_ENVIRONMENT, **os.environ, opened: "1"}
    environment.pop(OVERRIDING_VARIABLE, None)
    key = listener.api_key or (data.engine.api_key if isinstance(data.engine, VLLMServerEngine) else None)
    arguments |= guarded(environment, key, listener)
    return ServerCommand([sys.executable, "-m", SERVER_MODULE, *as_options(arguments)], environment)


def guarded(environment: dict[str, str], key: str | None, listener: Listener) -> dict[str, str]:
    """Puts the key that requests must contain into the environment; returns the arguments with which the server checks it.

    Args:
        environment: Environment variables of the server. One of them may hold the key already.
        key: The key; None uses that of the environment, if any.
        listener: Address of the server.

    Raises:
        ConfigError: A header cannot contain the key, or there is none and other machines can reach the server.
    """
    environment[API_KEY_VARIABLE] = checked_key(key or environment.get(API_KEY_VARIABLE, ""), listener)
    if not environment[API_KEY_VARIABLE]:
        return {}
    return {"middleware": f"{KeyGuard.__module__}.{KeyGuard.__qualname__}"}


def checked_key(key: str, listener: Listener) -> str:
    """The key that requests must contain, "" for none.

    Raises:
        ConfigError: A header cannot contain it, or there is none and other machines can reach the server.
    """
    if key and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise ConfigError(
            "the API key must be printable ASCII without blanks at its ends, as in a header of a request: choose "
            "another --api_key"
        )
    if not key and not is_loopback(listener.host):
        if not listener.allow_open:
            raise ConfigError(
                f"--host {listener.host} lets other machines reach the server, and there is no API key: set {API_KEY_VARIABLE}, "
                "also where the run is, or give --allow_open if only trusted machines are on the network"
            )
        logger.warning(
            "the server at %s requires no key: all machines that reach it can sample, load adapters and stop it",
            listener.host,
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address.

    >>> is_loopback("127.0.0.2"), is_loopback("::1"), is_loopback("localhost"), is_loopback("0.0.0.0"), is_loopback("a.b")
    (True, True, True, False, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def transfer_arguments(settings: VLLMSettings) -> dict[str, Any]:
    """Arguments with which a server accepts whole weights through vLLM's weight transfer (untested on a GPU).

    Raises:
        ConfigError: This machine has no GPU, or the server would quantize the weights that it receives.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "model.policy.lora.enabled is false and this machine has no GPU: whole weights reach a vLLM server through vLLM's "
            "weight transfer, which goes from GPU to GPU. Train an adapter"
        )
    if settings.quantization is not None:
        raise ConfigError(
            f'data.engine.init_args.quantization="{settings.quantization}" and model.policy.lora.enabled=false: the weights that '
            "are trained would be sampled from in another precision. Leave one of them out"
        )
    return {"weight_transfer_config": {"backend": "nccl"}, "worker_extension_cls": WORKER_EXTENSION}


def check_port(host: str, port: int) -> None:
    """Checks that the port is free, since vLLM opens it only after it has loaded the model.

    Raises:
        ConfigError: The port is taken, or the address is not one of this machine.
    """
    if not 0 < port < 2**16:
        raise ConfigError(f"--port must be between 1 and {2**16 - 1}, got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # as the server: a port that was just closed is free
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"--port {port} on {host} is taken by another program: choose another, and name it in data.engine.init_args.urls "
                "of the run too"
            ) from error
        raise ConfigError(
            f"nothing can listen on --host {host} --port {port} ({error.strerror}): give an address of this machine and a port "
            "that you may use"
        ) from error


def serve(arguments: list[str]) -> NoReturn:
    """Runs `fuchsia serve`: for the training of a config if one is given, else for a run."""
    given, rest = serve_config_options().parse_known_args(arguments)
    try:
        check_port(given.host, given.port)
        if not any(word.partition("=")[0] in CONFIG_OPTIONS for word in rest):
            from fuchsia_pl.cli.serve_run import serve_run  # it imports this module

            serve_run(arguments)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error
    ServeCLI(["fit", *rest], listener_of(given))
    raise AssertionError("the server took this process's place")


def listener_of(given: Namespace) -> Listener:
    """The address and the key of a command line."""
    return Listener(given.host, given.port, given.api_key, given.allow_open)
