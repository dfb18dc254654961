"""The model card of exported weights: a README.md for people and, in its first lines, for the hub."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fuchsia_pl.engines.vllm_arguments import VLLM_LORA_RANKS

Form = Literal["peft", "merged", "gguf", "ollama"]

LIBRARIES: dict[Form, str] = {"peft": "peft", "merged": "transformers", "gguf": "gguf", "ollama": "gguf"}
DESCRIPTIONS: dict[Form, str] = {
    "peft": "A LoRA adapter for",
    "merged": "All weights of a model, with the training merged in. It was trained from",
    "gguf": "A model in GGUF format, with the training merged in. It was trained from",
    "ollama": "A model in GGUF format with a Modelfile for Ollama. It was trained from",
}
TAG = "fuchsia-pl"
CURVE_ROWS = 11
CURVE_COLUMNS = {"reward/mean": "reward", "rollout/accuracy": "accuracy", "train/kl": "KL"}


@dataclass(frozen=True)
class HeldOutFigure:
    """A figure on held-out items, with its 95 % interval if there is one.

    Attributes:
        step: Optimizer steps before the evaluation.
        split: Name of the split.
        name: Name of the metric.
        value: The figure.
        low: Lower end of the interval.
        high: Upper end of the interval.
        num_items: Number of items; None if it was not recorded.

    >>> HeldOutFigure(25, "validation", "rollout/accuracy", 0.5, 0.4, 0.6).text
    '0.500 (0.400 to 0.600)'
    """

    step: int
    split: str
    name: str
    value: float
    low: float | None = None
    high: float | None = None
    num_items: int | None = None

    @property
    def text(self) -> str:
        """The figure with its interval."""
        interval = "" if self.low is None or self.high is None else f" ({self.low:.3f} to {self.high:.3f})"
        return f"{self.value:.3f}{interval}"


@dataclass(frozen=True)
class CardFacts:
    """Contents of a model card.

    Attributes:
        name: Name of the trained model, such as "quickstart-0".
        base: Name of the base model on the hub, or of its folder.
        version: Version of Fuchsia-PL.
        quantized_source: GGUF file whose dequantized weights were trained; None for weights that were not quantized.
        rank: Rank of the adapter; None if all weights were trained.
        license: Licence of the base; None if it is not known.
        environment: Class of the environment; None if it is not known.
        objective: Name of the objective; None if it is not known.
        settings: Settings of the run that differ from their defaults, as text.
        curve: Rows of training metrics, with the key "step" (counted from 1).
        held_out: Figures on held-out items.

    >>> CardFacts("quickstart-0", "HuggingFaceTB/SmolLM2-135M-Instruct", "0.1.0").held_out
    ()
    """

    name: str
    base: str
    version: str
    quantized_source: str | None = None
    rank: int | None = None
    license: str | None = None
    environment: str | None = None
    objective: str | None = None
    settings: dict[str, str] = field(default_factory=dict)
    curve: Sequence[dict[str, float]] = ()
    held_out: Sequence[HeldOutFigure] = ()


def model_card(facts: CardFacts, form: Form, repository: str | None = None) -> str:
    """The text of a card.

    Args:
        facts: Facts of the run.
        form: Format of the files beside the card.
        repository: Id of the repository on the hub that gets the files; None if they are only local.
    """
    parts = [
        f"# {facts.name}",
        _introduction(facts, form),
        f"## Use it\n\n{_usage(facts, form, repository or '.')}",
        _held_out_section(facts),
        _curve_section(facts),
        _settings_section(facts),
        _license_section(facts),
    ]
    body = "\n\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{_front_matter(facts, form)}\n---\n\n{body}\n"))


def _front_matter(facts: CardFacts, form: Form) -> str:
    data = ModelCardData(
        base_model=facts.base if "/" in facts.base else None,  # the hub refuses a name that is no id
        library_name=LIBRARIES[form],
        license=facts.license,
        pipeline_tag="text-generation",
        tags=[TAG, "reinforcement-learning", *(["lora"] if form == "peft" else [])],
        model_name=facts.name,
        eval_results=_results(facts) or None,
    )
    return data.to_yaml()


def _results(facts: CardFacts) -> list[EvalResult]:
    """The last figures of each split, as the hub shows them."""
    environment = facts.environment or "environment"
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=environment,
            dataset_name=environment.rpartition(".")[2],
            dataset_split=figure.split,
            metric_type=figure.name,
            metric_value=round(figure.value, 6),
            metric_name=f"{figure.name} after {figure.step} steps",
        )
        for figure in _last(facts.held_out)
    ]


def _last(figures: Sequence[HeldOutFigure]) -> list[HeldOutFigure]:
    return list({(figure.split, figure.name): figure for figure in sorted(figures, key=lambda f: f.step)}.values())


def _introduction(facts: CardFacts, form: Form) -> str:
    lines = [f"{DESCRIPTIONS[form]} `{facts.base}`, trained by reinforcement learning with Fuchsia-PL {facts.version}."]
    if facts.environment:
        objective = f" and the objective `{facts.objective}`" if facts.objective else ""
        lines.append(f"Items and rewards are those of the environment `{facts.environment}`{objective}.")
    if facts.quantized_source:
        lines.append(
            f"The trained base weights were those of `{facts.quantized_source}`, dequantized. They differ slightly from the "
            f"unquantized weights of `{facts.base}`, so figures on those may differ as well."
        )
    if "/" not in facts.base:
        lines.append(
            "The base was a local folder of that name: its id on the hub is not recorded (setting `model.policy.hub_id`)."
        )
    return "\n".join(lines)


def _usage(facts: CardFacts, form: Form, place: str) -> str:
    rank = next((r for r in VLLM_LORA_RANKS if r >= (facts.rank or 1)), facts.rank)
    code: dict[Form, str] = {
        "peft": f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{facts.base}", dtype="auto")
model = PeftModel.from_pretrained(base, "{place}")
tokenizer = AutoTokenizer.from_pretrained("{facts.base}")
```

```sh
vllm serve {facts.base} --enable-lora --max-lora-rank {rank} --lora-modules {facts.name}={place}
```""",
        "merged": f"""```python
from transformers import pipeline

chat = pipeline("text-generation", model="{place}")
chat([{{"role": "user", "content": "…"}}])
```

```sh
vllm serve {place} --served-model-name {facts.name}
```""",
        "gguf": f"""```sh
llama-cli -m {facts.name}.gguf
```""",
        "ollama": f"""```sh
ollama create {facts.name} -f Modelfile
ollama run {facts.name}
```""",
    }
    return code[form]


def _held_out_section(facts: CardFacts) -> str:
    """Figures before training and after the last step, side by side."""
    if not facts.held_out:
        return ""
    first = {(f.split, f.name): f for f in sorted(facts.held_out, key=lambda f: -f.step)}
    rows = ["| split | figure | before or first | last |", "|---|---|---|---|"]
    for last in _last(facts.held_out):
        start = first[(last.split, last.name)]
        before = f"{start.text}, step {start.step}" if start.step < last.step else "-"
        items = f", {last.num_items} items" if last.num_items else ""
        rows.append(f"| {last.split} | {_cell(last.name)} | {before} | {last.text}, step {last.step}{items} |")
    note = (
        "Intervals (in brackets) are of 95 % over items: Wilson's for shares, a bootstrap for other means."
        if any(f.low is not None for f in facts.held_out)
        else ""
    )
    return "\n".join(["## Held-out figures", "", *rows, *(["", note] if note else [])])


def _curve_section(facts: CardFacts) -> str:
    """Training metrics of at most eleven steps, the first and the last among them."""
    columns = [name for name in CURVE_COLUMNS if any(name in row for row in facts.curve)]
    if not facts.curve or not columns:
        return ""
    last, count = len(facts.curve) - 1, min(CURVE_ROWS, len(facts.curve))
    chosen = [facts.curve[round(i * last / max(count - 1, 1))] for i in range(count)]
    rows = ["| step | " + " | ".join(CURVE_COLUMNS[name] for name in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in chosen:
        values = (f"{row[name]:.3f}" if name in row else "-" for name in columns)
        rows.append(f"| {row['step']:.0f} | " + " | ".join(values) + " |")
    return "\n".join(["## Training curve", "", *rows])


def _settings_section(facts: CardFacts) -> str:
    if not facts.settings:
        return ""
    rows = [f"| `{_cell(name)}` | `{_cell(value)}` |" for name, value in facts.settings.items()]
    return "\n".join(["## Settings that differ from the defaults", "", "| setting | value |", "|---|---|", *rows])


def _license_section(facts: CardFacts) -> str:
    known = f"`{facts.license}`" if facts.license else "not recorded here; see the card of the base"
    return f"## Licence\n\nThe licence of `{facts.base}` holds for these weights too. It is {known}."


def _cell(text: str) -> str:
    """A text inside a cell of a table: on one line, without the marks of cells and code."""
    return " ".join(text.replace("|", "/").replace("`", "'").split())
