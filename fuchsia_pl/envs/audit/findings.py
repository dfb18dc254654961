"""Faults of a reward, judged from the scores of an audit."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from fuchsia_pl.envs.audit.probes import Probe, ProbeKind
from fuchsia_pl.envs.audit.task import Score

# The reward of a text, as a share of the gold answer's, from which on it is paid. Rewards may give a small reward for the form
# of an answer (0.01 to 0.1 is common), and a number near the right one may earn a part.
EMPTY_SHARE = 0.1
JUNK_SHARE = 0.5
MAX_NAMED = 4  # texts that a finding names


class FindingKind(StrEnum):
    """Faults, the gravest first."""

    NOT_MADE = "cannot be made"
    EVALUATES = "evaluates text"
    PAYS_JUNK = "pays for junk"
    GOLD_UNPAID = "gold does not score"
    RAISES = "raises"
    HANGS = "hangs"
    DIES = "ends its process"
    NOT_REPEATABLE = "not repeatable"
    REPEATS = "held-out items are training items"


@dataclass(frozen=True)
class Finding:
    """A fault of a task's reward.

    Attributes:
        kind: The fault.
        task: Name of the task.
        probe: The texts that show it; "" if it shows without one.
        evidence: What was observed, in one line.

    >>> str(Finding(FindingKind.PAYS_JUNK, "halting", "'nan'", "earns 1, and the gold answer 1"))
    "halting pays for junk ('nan'): earns 1, and the gold answer 1"
    """

    kind: FindingKind
    task: str
    probe: str
    evidence: str

    def __str__(self) -> str:
        shown = f" ({self.probe})" if self.probe else ""
        return f"{self.task} {self.kind}{shown}: {self.evidence}"


@dataclass(frozen=True)
class Outcome:
    """The result of a probe on an item.

    Attributes:
        item: Position of the item among those of the audit.
        probe: The text.
        score: Its score; None if there is none.
        fault: What happened instead, or besides.
        detail: The error, in one line.

    >>> Outcome(0, Probe("empty turn", ProbeKind.EMPTY, ("",)), Score(0.0, is_correct=False)).fault is None
    True
    """

    item: int
    probe: Probe
    score: Score | None
    fault: FindingKind | None = None
    detail: str = ""


def judge(task: str, outcomes: Sequence[Outcome], golds: Sequence[Score] = ()) -> list[Finding]:
    """The faults that the outcomes of a task show, one finding for each kind.

    Args:
        task: Name of the task.
        outcomes: The outcomes of all probes.
        golds: Scores of the gold answers of further items.
    """
    by_kind: dict[FindingKind, list[tuple[str, str]]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.fault is not None:
            by_kind[outcome.fault].append((outcome.probe.name, outcome.detail))
    by_kind[FindingKind.GOLD_UNPAID] += _unpaid_golds(
        [*(one.score for one in outcomes if one.probe.kind is ProbeKind.GOLD and one.score), *golds]
    )
    by_kind[FindingKind.PAYS_JUNK] += _paid_junk(outcomes)
    return [finding(kind, task, by_kind[kind]) for kind in FindingKind if by_kind[kind]]


def finding(kind: FindingKind, task: str, shown: Sequence[tuple[str, str]]) -> Finding:
    """A finding from the names of the texts that show it, with what was observed on each."""
    names = list(dict.fromkeys(name for name, _ in shown))
    rest = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return Finding(kind, task, ", ".join(names[:MAX_NAMED]) + rest, shown[0][1])


def _unpaid_golds(golds: Sequence[Score]) -> list[tuple[str, str]]:
    unpaid = [score for score in golds if not score.is_correct]
    if not unpaid:
        return []
    first = unpaid[0]
    earned = (
        f"raises {first.error}"
        if first.error
        else "earns nothing"
        if first.reward is None
        else f"earns {first.reward:g}"
    )
    return [("gold", f"{earned}, and is not correct on {len(unpaid)} of {len(golds)} items")]


def _paid_junk(outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    golds = {
        one.item: one.score.reward
        for one in outcomes
        if one.probe.kind is ProbeKind.GOLD and one.score is not None and one.score.is_correct
    }
    by_name: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.probe.kind not in (ProbeKind.GOLD, ProbeKind.WITH_GOLD) and outcome.score is not None:
            by_name[outcome.probe.name].append(outcome)
    found = []
    for name, played in by_name.items():
        paid = [one for one in played if _is_paid(one, golds.get(one.item))]
        if paid and len(paid) >= math.ceil(len(played) / 2):
            found.append((name, _earned(paid, len(played), golds)))
    return found


def _is_paid(outcome: Outcome, gold: float | None) -> bool:
    """Whether a text that is not the gold answer earns too much."""
    score = outcome.score
    if score is None or score.reward is None:
        return False
    if gold is None or gold <= 0.0:  # there is no scale
        return score.is_correct
    if outcome.probe.kind is ProbeKind.CUT:  # a part of a right answer may be partly right
        return score.is_correct or score.reward >= gold
    return score.reward > gold * (EMPTY_SHARE if outcome.probe.kind is ProbeKind.EMPTY else JUNK_SHARE)


def _earned(paid: Sequence[Outcome], played: int, golds: dict[int, float | None]) -> str:
    best = max(paid, key=lambda one: one.score.reward if one.score and one.score.reward else 0.0)
    gold = golds.get(best.item)
    than = "" if gold is None else f", the gold answer {gold:g}"
    assert best.score is not None
    return f"earns {best.score.reward:g}{than}, on {len(paid)} of {played} items"
