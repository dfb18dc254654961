"""Figures of the rollouts of a held-out split, over all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fuchsia_pl.envs.base import Environment
from fuchsia_pl.envs.bounded import call_apart
from fuchsia_pl.envs.user_code import user_code
from fuchsia_pl.evaluation.figures import Figure
from fuchsia_pl.evaluation.held_out import HeldOut
from fuchsia_pl.evaluation.intervals import mean_interval, share_interval
from fuchsia_pl.evaluation.item_table import Fractions, ItemSums, ItemTable, split_name
from fuchsia_pl.evaluation.passes import majority_correct, pass_at_k, pass_sizes
from fuchsia_pl.rollouts.metrics import are_correct, count_fractions, in_parts, over_ranks, rate_fractions
from fuchsia_pl.rollouts.ranks import Ranks
from fuchsia_pl.samples import Evaluation
from fuchsia_pl.types import Rollout

# Samples with an answer; the figure itself is not reported. Without any, there is no maj@k.
ANSWERED = "answered"


@dataclass(frozen=True)
class Grade:
    """The judgement of a rollout by its environment.

    Attributes:
        correct: `Environment.is_correct`.
        answer: `Environment.answer`, None if it gives none.

    >>> Grade(correct=True, answer="72").answer
    '72'
    """

    correct: bool
    answer: str | None


@dataclass(frozen=True)
class HeldOutEvaluation(Evaluation):
    """An evaluation with its figures. `rollouts` and `grades` are those of this rank, all else is of all ranks.

    Attributes:
        grades: One per rollout, in the same order.
        table: Sums of each item.
        held_out: Figures with intervals.
        shared: Positions of the items whose prompt is also the prompt of a training item.
        is_whole: Whether it covers all items of the run's evaluations. A sanity check may cover the first ones only.

    >>> held_out = HeldOut(0, "validation", 0, 1, "Arithmetic")
    >>> HeldOutEvaluation((), {}, (), ItemTable((), [], torch.zeros(0, 0), torch.zeros(0, 0)), held_out).is_whole
    True
    """

    grades: tuple[Grade, ...]
    table: ItemTable
    held_out: HeldOut
    shared: frozenset[int] = frozenset()
    is_whole: bool = True


def graded(rollouts: Sequence[Rollout], environment: Environment) -> list[Grade]:
    """The judgements of an environment. Its code is called."""
    correct = are_correct(rollouts, environment)
    with user_code(f"{type(environment).__name__}.answer"):
        answers = [environment.answer(rollout) for rollout in rollouts]
    return [Grade(*pair) for pair in zip(correct, answers, strict=True)]


def item_fractions(siblings: Sequence[Rollout], grades: Sequence[Grade]) -> Fractions:
    """Numerators and denominators of all figures of one item.

    Args:
        siblings: The samples of the item, [k].
        grades: Their judgements, [k].

    Returns:
        The rates of `rollouts.metrics`. With several samples also mean@k, pass@1, 2, 4, … k, maj@k and the number of answers.
        A sample that was not scored counts as wrong.
    """
    correct, answers = [grade.correct for grade in grades], [grade.answer for grade in grades]
    found = dict(rate_fractions(siblings, correct))
    number, num_correct = len(siblings), sum(correct)
    if number == 1:
        return found
    found[f"mean@{number}"] = (num_correct / number, 1.0)
    for k in pass_sizes(number):
        found[f"pass@{k}"] = (pass_at_k(number, num_correct, k), 1.0)
    found[f"maj@{number}"] = (majority_correct(answers, correct), 1.0)
    found[ANSWERED] = (0.0, float(sum(answer is not None for answer in answers)))
    return found


def item_table(
    groups: Sequence[Sequence[Rollout]], grades: Sequence[Grade], environment: Environment, device: torch.device
) -> ItemTable:
    """The sums of all items of all ranks. All ranks must call it at the same time.

    Args:
        groups: The samples of each item of this rank, each [k].
        grades: One per rollout, in order.
        environment: If it is a mixture, the table has the figures of each part as well.
        device: Device on which the ranks exchange them.
    """
    left = iter(grades)
    fractions = [item_fractions(siblings, [next(left) for _ in siblings]) for siblings in groups]
    if environment.mixed:
        parts = [siblings[0].part for siblings in groups]
        fractions = [in_parts({part: own}, environment) for part, own in zip(parts, fractions, strict=True)]
    sums = ItemSums(list(fractions[0])).to(device)
    sums.update([siblings[0].item_index for siblings in groups], fractions)
    return sums.table()


def reported_names(table: ItemTable) -> list[str]:
    """Names of the figures of a table. Without any answer there is no maj@k, in total or of a part."""
    found = []
    for name in table.names:
        part, own = split_name(name)
        if own != ANSWERED and (not own.startswith("maj@") or table.covers(part + ANSWERED)):
            found.append(name)
    return found


def figures_of(table: ItemTable) -> dict[str, Figure]:
    """All figures of a table that cover a sample, with their intervals."""
    return {name: _figure(table, name) for name in reported_names(table) if table.covers(name)}


def _figure(table: ItemTable, name: str) -> Figure:
    interval = share_interval if table.is_share(name) else mean_interval
    return Figure(table.value(name), *interval(table.values(name)))


@dataclass(frozen=True)
class Occasion:
    """When and on what an evaluation was made.

    Attributes:
        step: Optimizer steps that the policy was trained for.
        split: "validation" or "test".
        shared: Positions of the items whose prompt is also the prompt of a training item; None if that is not known.
        is_whole: Whether it covers all items of the run's evaluations.

    >>> Occasion(step=25, split="validation").is_whole
    True
    """

    step: int
    split: str
    shared: frozenset[int] | None = None
    is_whole: bool = True


def measure(
    groups: Sequence[Sequence[Rollout]],
    environment: Environment,
    occasion: Occasion,
    ranks: Ranks,
    device: torch.device,
) -> HeldOutEvaluation:
    """Judges rollouts and computes metrics and figures over all ranks. All ranks must call it at the same time.

    Args:
        groups: The samples of each item of this rank, each [k].
        environment: Its code runs in a thread, without a time limit, as `is_correct` always did.
        occasion: When and on what.
        ranks: This rank and the others.
        device: Device on which ranks exchange sums.

    Raises:
        ValueError: A rollout has a counter that the environment does not declare.
    """
    rollouts = tuple(rollout for siblings in groups for rollout in siblings)
    grades = call_apart(graded, rollouts, environment)
    counts = over_ranks(call_apart(count_fractions, rollouts, environment, ranks.size), ranks.add_up)
    table = item_table(groups, grades, environment, device)
    shared = None if occasion.shared is None else occasion.shared & set(table.items)
    held_out = HeldOut(
        occasion.step,
        occasion.split,
        len(table.items),
        len(groups[0]),
        type(environment).__name__,
        figures_of(table),
        None if shared is None else len(shared),
    )
    metrics = {**{name: table.value(name) for name in reported_names(table)}, **counts}
    return HeldOutEvaluation(
        rollouts, metrics, tuple(grades), table, held_out, shared or frozenset(), occasion.is_whole
    )
