"""Trained weights by the name that a user gives: those of a run, or an adapter folder with its base."""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fuchsia_pl.callbacks.adapter_export import ADAPTER_FOLDER
from fuchsia_pl.callbacks.card_facts import card_facts, read_config, run_name
from fuchsia_pl.cli.failures import one_line
from fuchsia_pl.cli.find_run import find_run
from fuchsia_pl.cli.run_folder import DEFAULT_ROOT, SAVED_CONFIG
from fuchsia_pl.policy.adapter_files import ADAPTER_CONFIG, read_adapter_config
from fuchsia_pl.policy.config import LoRASettings, PolicyConfig
from fuchsia_pl.policy.sources import base_id, read_template, resolve_model
from fuchsia_pl.report.model_card import CardFacts
from fuchsia_pl.rollouts.template import BLANK_LINES
from fuchsia_pl.types import PLAIN_TEXT, ConfigError

MODEL_CONFIG = "config.json"


@dataclass(frozen=True)
class Trained:
    """Trained weights, and what is needed to use them.

    Attributes:
        weights: Folder of a PEFT adapter, or of a whole model.
        name: Readable name, such as "quickstart-0".
        policy: Name, type, chat template and adapter of the trained model.
        run: Run folder; None for an adapter without a run.
    """

    weights: Path
    name: str
    policy: PolicyConfig
    run: Path | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether the weights are an adapter, not a whole model."""
        return (self.weights / ADAPTER_CONFIG).is_file()

    @property
    def base_id(self) -> str:
        """The name of the base on other machines."""
        return base_id(self.policy.name, self.policy.hub_id)

    @cached_property
    def base(self) -> Path:
        """Folder of the base model. It may be downloaded or converted first."""
        try:
            return resolve_model(self.policy.name)
        except ConfigError as error:
            raise ConfigError(f"the base of {self.weights} was not found: {error}. Or name it with --base") from error

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The base's tokenizer with the chat template of the run."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.base)
        except (OSError, ValueError) as error:
            raise ConfigError(f"the tokenizer in {self.base} cannot be loaded: {one_line(error)}") from error
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        return tokenizer

    @property
    def chat_template(self) -> str | None:
        """The chat template that replaced the tokenizer's in the run; None if none did."""
        template = read_template(self.policy.chat_template)
        return BLANK_LINES if template == PLAIN_TEXT else template

    @property
    def facts(self) -> CardFacts:
        """Facts for the model card."""
        license_name = _license(self.base)
        if self.run is not None:
            return card_facts(self.run, self.policy, license_name)
        return replace(card_facts(self.weights, self.policy, license_name), name=self.name)


def find_weights(given: str, root: str | Path = DEFAULT_ROOT) -> tuple[Path, Path | None]:
    """The folder of trained weights, and the run that they are of; None for an adapter without a run.

    Args:
        given: A run (see `find_run`), or the folder of an adapter.
        root: Folder of the runs.

    Raises:
        RunNotFoundError: It is neither.
        ConfigError: The run has no trained weights yet.
    """
    folder = Path(given).expanduser()
    if (folder / ADAPTER_CONFIG).is_file():
        parent = folder.resolve().parent
        is_of_run = folder.resolve().name == ADAPTER_FOLDER and (parent / SAVED_CONFIG).is_file()
        return folder, parent if is_of_run else None
    run = find_run(given, root)
    folder = run / ADAPTER_FOLDER
    if not any((folder / name).is_file() for name in (ADAPTER_CONFIG, MODEL_CONFIG)):
        raise ConfigError(
            f"the run {run} has no trained weights: {folder} is written with the first checkpoint and at the end of training"
        )
    return folder, run


def find_trained(given: str, root: str | Path = DEFAULT_ROOT, base: str | None = None) -> Trained:
    """Finds trained weights.

    Args:
        given: A run (see `find_run`), or the folder of an adapter.
        root: Folder of the runs.
        base: The base model, if it is not the one that the run or the adapter names.

    Raises:
        ConfigError: There are none, or their config cannot be read.
    """
    folder, run = find_weights(given, root)
    policy = _policy_of_adapter(folder) if run is None else _policy_of_run(run)
    if base is not None:
        policy = replace(policy, name=base, hub_id=policy.hub_id or base_id(policy.name))
    return Trained(folder, _readable(run, folder), policy, run)


def _readable(run: Path | None, folder: Path) -> str:
    name = folder.resolve().name if run is None else run_name(run)
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)


def _policy_of_run(run: Path) -> PolicyConfig:
    """The policy of a saved config; settings of other versions are left out."""
    given = read_config(run / SAVED_CONFIG).get("model")
    policy = given.get("policy") if isinstance(given, dict) else None
    if not isinstance(policy, dict) or not isinstance(policy.get("name"), str):
        raise ConfigError(
            f"{run / SAVED_CONFIG} names no model (model.policy.name): it is not the config of a training"
        )
    lora = LoRASettings(**_known(LoRASettings, policy.get("lora")))
    names = ("dtype", "chat_template", "hub_id")
    kept: dict[str, Any] = {name: policy[name] for name in names if policy.get(name) is not None}
    return PolicyConfig(policy["name"], lora=lora, **kept)


def _policy_of_adapter(folder: Path) -> PolicyConfig:
    config = read_adapter_config(folder)
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{folder / ADAPTER_CONFIG} names no base model: name it with --base")
    return PolicyConfig(name, lora=LoRASettings(r=config["r"], alpha=config.get("lora_alpha") or config["r"]))


def _known(settings: type[LoRASettings], given: Any) -> dict[str, Any]:
    names = {field.name for field in fields(settings)}
    return {name: value for name, value in given.items() if name in names} if isinstance(given, dict) else {}


def _license(folder: Path) -> str | None:
    """The licence on the card of a downloaded model."""
    from huggingface_hub import ModelCard

    file = folder / "README.md"
    try:
        found = ModelCard(file.read_text(encoding="utf-8")).data.to_dict().get("license") if file.is_file() else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, str) else None
