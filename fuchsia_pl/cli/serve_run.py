"""`fuchsia serve RUN`: the stock vLLM OpenAI server with the trained weights of a run beside their base."""

import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import AutoConfig, PretrainedConfig

from fuchsia_pl import orphans
from fuchsia_pl.callbacks.card_facts import read_config
from fuchsia_pl.cli.options import serve_options
from fuchsia_pl.cli.run_folder import SAVED_CONFIG
from fuchsia_pl.cli.serve import SERVER_MODULE, Listener, ServerCommand, become, guarded, listener_of
from fuchsia_pl.cli.trained import Trained, find_trained
from fuchsia_pl.engines.merge import adapter_rank
from fuchsia_pl.engines.vllm_arguments import GIB, OVERRIDING_VARIABLE, VLLM_ENVIRONMENT, as_options, vllm_arguments
from fuchsia_pl.engines.vllm_colocated import VLLMColocatedEngine
from fuchsia_pl.scratch import remove_left_behind
from fuchsia_pl.types import ConfigError, ServedModel

MIN_LENGTH = 32


def serve_run(arguments: list[str]) -> NoReturn:
    """Replaces this process by the server of a run.

    Args:
        arguments: The words after `fuchsia serve`.

    Raises:
        ConfigError: There are no such weights, an option is unknown, or a setting does not work on this machine.
    """
    given, unknown = serve_options().parse_known_args(arguments)
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is not an option of `fuchsia serve RUN`: see `fuchsia serve --help`")
    trained = find_trained(given.run, given.root, given.base)
    command = run_server_command(trained, given, listener_of(given))
    sys.stdout.write(f"{served_names(trained)} at http://{given.host}:{given.port}/v1\n")
    orphans.watch()
    remove_left_behind()
    become(command)


def served_names(trained: Trained) -> str:
    """What the server will answer to, as text."""
    if trained.is_adapter:
        return f"serving {trained.name} (trained) and {trained.base_id} (its base)"
    return f"serving {trained.name} (trained)"


def run_server_command(trained: Trained, given: Namespace, listener: Listener) -> ServerCommand:
    """The command that starts the server.

    Args:
        trained: The weights. An adapter is served under its name, beside the base under that of the base.
        given: Options of the command.
        listener: Address and key.

    Raises:
        ConfigError: A length or a key cannot be used.
    """
    engine = VLLMColocatedEngine(kv_cache_gb=given.kv_cache_gb, enforce_eager=is_eager(trained))
    dtype = given.dtype or trained.policy.dtype
    model_folder = trained.base if trained.is_adapter else trained.weights
    rank = adapter_rank(trained.weights) if trained.is_adapter else 0
    config = AutoConfig.from_pretrained(trained.base)
    length = served_length(config, dtype, given.kv_cache_gb, given.max_model_len)
    model = ServedModel(str(model_folder), dtype, rank, resolve=Path)
    arguments: dict[str, Any] = {
        **vllm_arguments(engine.settings, model, length, seed=0),
        "tokenizer": str(trained.base),
        "chat_template": trained.chat_template,
        "served_model_name": trained.base_id if trained.is_adapter else trained.name,
        "host": listener.host,
        "port": listener.port,
    }
    if trained.is_adapter:
        arguments |= {
            "enable_lora": True,
            # On a CPU, vLLM 0.32 applies the last slot to the rows of the base in a batch that also has rows of the adapter: a
            # second slot stays empty, so nothing is added to them.
            "max_loras": 1 if torch.cuda.is_available() else 2,
            "lora_modules": f"{trained.name}={trained.weights.resolve()}",
        }
    environment = {**VLLM_ENVIRONMENT, **os.environ}
    environment.pop(OVERRIDING_VARIABLE, None)
    arguments |= guarded(environment, listener.api_key, listener)
    return ServerCommand([sys.executable, "-m", SERVER_MODULE, *as_options(arguments)], environment)


def served_length(config: PretrainedConfig, dtype: str, kv_cache_gb: float, wanted: int | None) -> int:
    """The longest prompt plus completion that the server accepts: that of the model, or as much as the cache holds.

    Args:
        config: Config of the model.
        dtype: Type of keys and values.
        kv_cache_gb: Memory for keys and values, in GiB.
        wanted: The user's length; None for the longest.

    Raises:
        ConfigError: The wanted length exceeds the model or the cache, or the cache is too small.
    """
    text = config.get_text_config()
    bytes_per_token = kv_bytes(text, dtype)
    held = int(kv_cache_gb * GIB) // bytes_per_token // MIN_LENGTH * MIN_LENGTH
    limit = int(text.max_position_embeddings)
    if held < MIN_LENGTH:
        raise ConfigError(
            f"--kv_cache_gb {kv_cache_gb:g} holds no request ({bytes_per_token} bytes per token): give more"
        )
    if wanted is None:
        return min(limit, held)
    if not 1 <= wanted <= limit:
        raise ConfigError(
            f"--max_model_len {wanted} is not between 1 and {limit}, the positions of the model: give another"
        )
    if wanted > held:
        raise ConfigError(
            f"--max_model_len {wanted} needs {wanted * bytes_per_token / GIB:.2f} GiB for keys and values, and --kv_cache_gb is "
            f"{kv_cache_gb:g}: raise that, or give at most {held}"
        )
    return wanted


def kv_bytes(config: PretrainedConfig, dtype: str) -> int:
    """Bytes of the keys and values of a token in all layers, as if every layer attended to all positions."""
    heads = config.to_dict().get("num_key_value_heads") or config.num_attention_heads
    head_dim = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_dim * getattr(torch, dtype).itemsize)


def is_eager(trained: Trained) -> bool:
    """Whether the engine of the run skips compilation. A server without a run compiles on a GPU only."""
    config = read_config(trained.run / SAVED_CONFIG) if trained.run is not None else {}
    found: Any = config
    for name in ("data", "engine", "init_args", "enforce_eager"):
        found = found.get(name) if isinstance(found, dict) else None
    return bool(found) if isinstance(found, bool) else not torch.cuda.is_available()
