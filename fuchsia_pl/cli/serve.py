"""`fuchsia serve`: the stock vLLM OpenAI server, started with what the configs of a run say.

The model, its type, the longest completion, the adapter's rank and the seed are those of the run; memory, parallelism and the
like are those of the config's VLLMColocatedEngine, or its defaults where the config names another engine.
"""

import argparse
import errno
import json
import logging
import os
import socket
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from lightning.pytorch.cli import ArgsType

from fuchsia_pl import orphans
from fuchsia_pl.cli.parts import PartsCLI
from fuchsia_pl.datamodule import RolloutDataModule
from fuchsia_pl.engines.vllm_arguments import (
    API_KEY_VARIABLE,
    NUM_SERVED_ADAPTERS,
    OVERRIDING_VARIABLE,
    VLLM_ENVIRONMENT,
    VLLMSettings,
    as_options,
    vllm_arguments,
)
from fuchsia_pl.engines.vllm_colocated import VLLMColocatedEngine
from fuchsia_pl.engines.vllm_processes import socket_environment
from fuchsia_pl.engines.vllm_server import VLLMServerEngine
from fuchsia_pl.scratch import remove_left_behind, scratch_folder
from fuchsia_pl.types import ConfigError

# The `vllm` command of the CPU build does not start: it asks for the metadata of a package of that name.
SERVER_MODULE = "vllm.entrypoints.openai.api_server"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
ADAPTER_ARGUMENTS = {"enable_lora": True, "max_loras": NUM_SERVED_ADAPTERS}
# What the trainer asks every few seconds, or after each completion, is no news.
QUIET_ENDPOINTS = "/health,/v1/models,/weight_info"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerCommand:
    """How the server is started.

    Attributes:
        words: The command line.
        environment: Its whole environment. The API key is here and not among the words, which everybody on the machine sees.

    >>> ServerCommand(["python", "-m", "x"], {"PATH": "/bin"}).words[2]
    'x'
    """

    words: list[str]
    environment: dict[str, str]


class ServeCLI(PartsCLI):
    """Becomes the server once the configs are read."""

    def __init__(self, args: ArgsType, host: str, port: int, api_key: str | None) -> None:
        self.host, self.port, self.api_key = host, port, api_key
        super().__init__(args)

    def use_parts(self) -> None:
        """Replaces this process by the server's, which gets the terminal and its signals and returns its own exit code."""
        orphans.watch()  # which goes on after this process has become the server
        remove_left_behind()
        command = server_command(self.datamodule, self.host, self.port, self.api_key)
        sys.stdout.flush()
        sys.stderr.flush()
        self.scratch = scratch_folder("vllm")  # which goes when the server has ended
        environment = {**command.environment, **socket_environment(self.scratch)}
        os.execve(command.words[0], command.words, environment)


def server_command(data: RolloutDataModule, host: str, port: int, api_key: str | None) -> ServerCommand:
    """What starts a server for a run.

    Args:
        data: The run's data module.
        host: Address that the server listens on.
        port: Port that it listens on.
        api_key: What requests must bring; None takes the environment's, if there is one.

    Raises:
        ConfigError: A setting does not work on this machine.
    """
    engine = data.engine if isinstance(data.engine, VLLMColocatedEngine) else VLLMColocatedEngine()
    model = data.served_model
    arguments = {
        **vllm_arguments(engine.settings, model, data.sampling.max_length, data.seed),
        **(ADAPTER_ARGUMENTS if model.lora_rank else transfer_arguments(engine.settings)),
        "host": host,
        "port": port,
        "disable_access_log_for_endpoints": QUIET_ENDPOINTS,
    }
    opened = "VLLM_ALLOW_RUNTIME_LORA_UPDATING" if model.lora_rank else "VLLM_SERVER_DEV_MODE"
    environment = {**VLLM_ENVIRONMENT, **os.environ, opened: "1"}
    environment.pop(OVERRIDING_VARIABLE, None)
    if api_key is None and isinstance(data.engine, VLLMServerEngine):
        api_key = data.engine.api_key
    if api_key is not None:
        environment[API_KEY_VARIABLE] = api_key
    if model.lora_rank == 0 and host not in LOOPBACK:
        logger.warning(
            "whoever reaches the server at %s can replace its weights and more: vLLM's development mode asks for no key",
            host,
        )
    if API_KEY_VARIABLE not in environment and host not in LOOPBACK:
        logger.warning("the server listens on %s and asks nobody for a key: set %s", host, API_KEY_VARIABLE)
    return ServerCommand([sys.executable, "-m", SERVER_MODULE, *as_options(arguments)], environment)


def transfer_arguments(settings: VLLMSettings) -> dict[str, Any]:
    """What lets a server take whole weights through vLLM's weight transfer (untested on a GPU).

    Raises:
        ConfigError: This machine has no GPU, or the server would quantize what it is given.
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
    return {"weight_transfer_config": json.dumps({"backend": "nccl"})}


def check_port(host: str, port: int) -> None:
    """Listens for a moment, since vLLM does so only after it has loaded the model.

    Raises:
        ConfigError: The port is taken, or the address is none of this machine.
    """
    if not 0 < port < 2**16:
        raise ConfigError(f"--port must be between 1 and {2**16 - 1}, got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # as the server: a port that was just left is free
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
    """Runs `fuchsia serve`."""
    parser = argparse.ArgumentParser(
        prog="fuchsia serve",
        description=__doc__,
        epilog="All other options are those of `fuchsia fit`; --debug shows the traceback of an error.",
        allow_abbrev=False,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument("--api_key", help="what requests must bring (default: the environment variable VLLM_API_KEY)")
    given, rest = parser.parse_known_args(arguments)
    try:
        check_port(given.host, given.port)
    except ConfigError as error:
        parser.error(str(error))
    ServeCLI(["fit", *rest], given.host, given.port, given.api_key)
    raise AssertionError("the server took this process's place")
