"""Facts of a run for its model card, read from the run folder."""

import math
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

import fuchsia_pl
from fuchsia_pl.callbacks.run_metrics import METRICS_FILE, read_rows
from fuchsia_pl.evaluation.held_out import read_held_out
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.policy.config import PolicyConfig
from fuchsia_pl.policy.sources import LICENSES, base_id, quantized_source
from fuchsia_pl.report.model_card import CURVE_COLUMNS, CardFacts, HeldOutFigure
from fuchsia_pl.rollouts.config import SamplingConfig

CONFIG_FILE = "config.yaml"
CARD_FILE = "README.md"
# Sections of a config with the class of their settings, which has the defaults.
SECTIONS = {"model.policy": PolicyConfig, "model.loss": LossConfig, "data.sampling": SamplingConfig}
# Settings without which a run cannot be repeated. They are shown with any value but null.
ALWAYS = (
    *("seed_everything", "trainer.max_steps", "trainer.precision", "trainer.gradient_clip_val"),
    *("data.batch_size", "data.steps_per_epoch", "model.optimizer", "model.lr_scheduler"),
)
MAX_SHOWN = 120  # characters of a value; a chat template may have thousands
SHOWN_FIGURES = ("reward/", "rollout/accuracy", "pass@", "maj@", "mean@")
# These are on the card in other words.
ELSEWHERE = ("model.policy.name", "model.policy.hub_id")


def run_name(folder: Path) -> str:
    """A readable name of a run, valid as the name of a served model: that of its config and its number.

    >>> run_name(Path("runs/quickstart/0"))
    'quickstart-0'
    """
    folder = folder.resolve()
    return f"{folder.parent.name}-{folder.name}"


def card_facts(run: Path, policy: PolicyConfig, license_name: str | None = None) -> CardFacts:
    """Reads the facts of a run. What a run folder lacks is left out.

    Args:
        run: Run folder.
        policy: Model and adapter.
        license_name: Licence of the base; None takes that of a packaged model.
    """
    config = read_config(run / CONFIG_FILE)
    base = base_id(policy.name, policy.hub_id)
    environment = _at(config, "data.environment.class_path")
    objective = _at(config, "model.loss.loss_type")
    return CardFacts(
        name=run_name(run),
        base=base,
        version=fuchsia_pl.__version__,
        quantized_source=quantized_source(policy.name),
        rank=policy.lora.r if policy.lora.enabled else None,
        license=license_name or LICENSES.get(base),
        environment=None if environment is None else str(environment),
        objective=None if objective is None else str(objective),
        settings=changed_settings(config),
        curve=curve(run / METRICS_FILE),
        held_out=held_out_figures(run),
    )


def read_config(file: Path) -> dict[str, Any]:
    """A saved config; empty if there is none that can be read."""
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def changed_settings(config: dict[str, Any]) -> dict[str, str]:
    """Settings that differ from their defaults, and those that every card shows.

    Arguments of environments, engines and loggers are left out: they may contain keys. Paths are reduced to their last part.
    """
    shown: dict[str, Any] = {}
    for name in ALWAYS:
        shown.update(_flat(name, _at(config, name)))
    for section, settings in SECTIONS.items():
        given, defaults = _at(config, section), dict(_flat(section, _defaults(settings)))
        shown.update({n: v for n, v in _flat(section, given) if n not in ELSEWHERE and v != defaults.get(n)})
    return {name: _without_path(value) for name, value in shown.items() if value is not None}


def curve(file: Path) -> list[dict[str, float]]:
    """Training metrics of each step, with steps counted from 1; empty without a metrics file."""
    rows: list[dict[str, float]] = []
    for row in read_rows(file) if file.is_file() else []:
        values = {name: float(row[name]) for name in CURVE_COLUMNS if row.get(name)}
        if values and row.get("step", "").isdecimal():
            rows.append({"step": int(row["step"]) + 1, **values})
    return rows


def held_out_figures(run: Path) -> list[HeldOutFigure]:
    """Rewards and accuracies of the recorded evaluations."""
    return [
        HeldOutFigure(
            evaluation.step,
            evaluation.split,
            name,
            figure.value,
            _finite(figure.low),
            _finite(figure.high),
            evaluation.num_items,
        )
        for evaluation in read_held_out(run)
        for name, figure in evaluation.figures.items()
        if name.startswith(SHOWN_FIGURES) and math.isfinite(figure.value)
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _at(config: dict[str, Any], name: str) -> Any:
    found: Any = config
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Settings as pairs of a dotted name and a value; a class with its arguments is one level."""
    if not isinstance(value, dict):
        yield name, value
        return
    if "class_path" in value:
        yield name, value["class_path"]
        value = value.get("init_args") or {}
    for part, inner in value.items():
        yield from _flat(f"{name}.{part}", inner)


def _defaults(settings: Any) -> dict[str, Any]:
    """Defaults of a dataclass, with those of nested ones."""
    found: dict[str, Any] = {}
    for one in fields(settings):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        if default is not MISSING:
            found[one.name] = _defaults(type(default)) if is_dataclass(default) else default
    return found


def _without_path(value: Any) -> str:
    text = str(value)
    if text.startswith(("/", "~", ".")) or ("/" in text and _exists(text)):
        return Path(text).name
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} …"


def _exists(text: str) -> bool:
    """Whether a text is the path of a file or folder. A text that is too long for a path is none."""
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False
