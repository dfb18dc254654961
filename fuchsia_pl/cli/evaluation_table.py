"""Results of `fuchsia eval` for people."""

from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.table import Table

from fuchsia_pl.evaluation.held_out import HeldOut
from fuchsia_pl.evaluation.measures import HeldOutEvaluation
from fuchsia_pl.evaluation.paired import Difference
from fuchsia_pl.rollouts.config import SamplingConfig


def evaluation_table(evaluation: HeldOutEvaluation, sampling: SamplingConfig) -> Table:
    """The figures of an evaluation with their intervals. Figures that are 0 for every item are left out."""
    held_out = evaluation.held_out
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=headline(held_out, sampling), title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, figure in held_out.figures.items():
        value, _, interval = str(figure).partition(" ")
        if figure.value != 0.0 or not name.endswith(("_fraction", "environment_tokens")):
            table.add_row(name, value, "" if figure.low != figure.low else interval.replace("[", r"\["))
    return table


def headline(held_out: HeldOut, sampling: SamplingConfig) -> str:
    """What was evaluated, in one sentence.

    >>> headline(HeldOut(25, "validation", 64, 4, "Arithmetic"), SamplingConfig(validation_temperature=1.0))
    'Arithmetic, after step 25: 64 items, 4 samples each, temperature 1, at most 256 tokens'
    """
    samples = "1 sample each" if held_out.num_samples == 1 else f"{held_out.num_samples} samples each"
    shared = f"; {held_out.num_shared} of {held_out.num_items} held-out items have the prompt of a training item"
    return (
        f"{held_out.environment}, after step {held_out.step}: {held_out.num_items} items, {samples}, "
        f"temperature {sampling.validation_temperature:g}, at most {sampling.held_out.max_completion_tokens} tokens"
        f"{shared if held_out.num_shared else ''}"
    )


def comparison_lines(name: str, compared: Mapping[str, Sequence[Difference]]) -> Iterator[str]:
    """A line per figure that differs on some item, after a line per environment."""
    for environment, found in compared.items():
        differing = [one for one in found if one.num_higher or one.num_lower]
        yield f"{environment}, against {name}, item by item (95 % interval, exact sign test):"
        width = max((len(one.name) for one in differing), default=0)
        for one in differing:
            yield f"  {one.name:<{width}}  {one}"
        if not differing:
            yield "  no figure differs on any item"
