"""Plays the probes of one task in limited processes."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fuchsia_pl.envs.audit.findings import Finding, FindingKind, Outcome, finding, judge
from fuchsia_pl.envs.audit.probes import Probe, probes
from fuchsia_pl.envs.audit.task import AuditItem, AuditTask, ReplyError, Score, read_items, read_scores, read_survey
from fuchsia_pl.envs.limited import LimitedWorkers, WorkerDied, WorkerFailure, WorkersNotStarted, WorkerTimeout

MAX_DETAIL = 160  # characters of an error in a finding
NUM_HEAVY_ITEMS = (
    1  # items on which the heavy texts are played: whether a reward hangs on one hardly depends on the item
)
# Limits of all light and of all heavy texts of an item together, as multiples of that of one text.
LIGHT_TOGETHER, HEAVY_TOGETHER = 5, 2
# A text on which a reward hangs costs twice the time limit. After so many the reward is known to be faulty.
MAX_HANGS = 3


@dataclass(frozen=True)
class AuditSettings:
    """Limits of an audit.

    Attributes:
        num_items: Items of each task on which the texts are played.
        timeout_s: Limit in CPU seconds of the score of a text.
        sample_timeout_s: Limit in CPU seconds of making the items of a task.
        memory_mb: Memory limit of a process in MiB.
        num_threads: Tasks that are audited at the same time.

    >>> AuditSettings(num_items=2).timeout_s
    2.0
    """

    num_items: int = 4
    timeout_s: float = 2.0
    sample_timeout_s: float = 20.0
    memory_mb: int = 1024
    num_threads: int = 2


@dataclass(frozen=True)
class Audited:
    """The result of the audit of a task.

    Attributes:
        task: Name of the task.
        findings: Its faults.
        unchecked: What was not checked, as sentences.
        num_played: Number of scored texts.
        seconds: Duration.

    >>> Audited("sums", (), (), num_played=240, seconds=0.5).findings
    ()
    """

    task: str
    findings: tuple[Finding, ...]
    unchecked: tuple[str, ...]
    num_played: int
    seconds: float


@dataclass
class TaskPlayer:
    """Plays the probes of one task.

    Args:
        task: The task.
        workers: Processes that run the task's function.
        others: Processes with other seeds, in which failures and scores are repeated.
        folder: An empty folder for markers.
        settings: The limits.
    """

    task: AuditTask
    workers: LimitedWorkers
    others: LimitedWorkers
    folder: Path
    settings: AuditSettings
    _outcomes: list[Outcome] = field(default_factory=list)
    _unchecked: list[str] = field(default_factory=list)
    _hanging: set[str] = field(default_factory=set)

    def run(self) -> Audited:
        """Plays and judges."""
        start = time.monotonic()
        try:
            items = self._sampled(self.workers)
        except (WorkerFailure, WorkersNotStarted, ReplyError) as error:
            found = [finding(FindingKind.NOT_MADE, self.task.name, [("", _line(error))])]
        else:
            for index, item in enumerate(items):
                self._play(index, item)
            train, held_out = self._survey("train"), self._survey("validation")
            golds = [score for _, score in (*train, *held_out) if score is not None]
            found = judge(self.task.name, self._outcomes, golds)
            found += [*self._not_repeatable(items), *self._repeated([q for q, _ in train], [q for q, _ in held_out])]
        seconds = time.monotonic() - start
        return Audited(self.task.name, tuple(found), tuple(self._unchecked), len(self._outcomes), seconds)

    def _sampled(self, workers: LimitedWorkers) -> list[AuditItem]:
        request = self.task.request("sample", split="train", num=self.settings.num_items)
        return read_items(workers.call(request, self.settings.sample_timeout_s))

    def _play(self, index: int, item: AuditItem) -> None:
        played = probes(item, self.folder)
        light = [probe for probe in played if not probe.is_heavy]
        heavy = [probe for probe in played if probe.is_heavy and index < NUM_HEAVY_ITEMS]
        for group, limit_s in ((light, self._light_s), (heavy, HEAVY_TOGETHER * self.settings.timeout_s)):
            together = self._together(index, item, group, limit_s)
            self._outcomes += together
            done = {outcome.probe.name for outcome in together}
            self._play_alone(index, item, [probe for probe in group if probe.name not in done])

    def _play_alone(self, index: int, item: AuditItem, played: Sequence[Probe]) -> None:
        for number, probe in enumerate(played):
            if len(self._hanging) >= MAX_HANGS:
                left = f"{len(played) - number} texts on item {index}"
                self._unchecked.append(f"{self.task.name}: {left}, since it hangs on {len(self._hanging)} others")
                return
            self._outcomes.append(self._alone(index, item, probe))

    def _together(self, index: int, item: AuditItem, played: Sequence[Probe], limit_s: float) -> list[Outcome]:
        """The outcomes of probes that are scored in one process, without those of heavy probes that fail there."""
        try:
            scores = self._scores(self.workers, item, played, limit_s)
        except (WorkerFailure, ReplyError):
            self._remove_markers(played)
            return []
        made = self._remove_markers(played)
        outcomes = _outcomes(index, played, scores)
        return [
            _evaluated(outcome) if outcome.probe in made else outcome
            for outcome in outcomes
            if outcome.fault is None or not outcome.probe.is_heavy
        ]

    @property
    def _light_s(self) -> float:
        """Limit in CPU seconds of the light probes of an item together."""
        return LIGHT_TOGETHER * self.settings.timeout_s

    def _alone(self, index: int, item: AuditItem, probe: Probe) -> Outcome:
        """The outcome of a probe that has a process of its own. A failure must repeat in another one, unless time ran out."""
        outcome = Outcome(index, probe, None)
        for workers in (self.workers, self.others):
            try:
                (outcome,) = _outcomes(index, [probe], self._scores(workers, item, [probe], self.settings.timeout_s))
            except (WorkerFailure, ReplyError) as error:
                outcome = Outcome(index, probe, None, _fault(error), _line(error))
            if outcome.fault in (None, FindingKind.HANGS):
                break
        if outcome.fault is FindingKind.HANGS:
            self._hanging.add(probe.name)
        return _evaluated(outcome) if self._remove_markers([probe]) else outcome

    def _scores(
        self, workers: LimitedWorkers, item: AuditItem, played: Sequence[Probe], timeout_s: float
    ) -> list[Score]:
        answers = [list(probe.turns) for probe in played]
        request = self.task.request("score", item=item.item, answers=answers)
        return read_scores(workers.call(request, timeout_s), len(answers))

    def _remove_markers(self, played: Sequence[Probe]) -> list[Probe]:
        """Removes the folders that executed code has made. Returns the probes whose code was executed."""
        made = [probe for probe in played if probe.marker is not None and probe.marker.exists()]
        for probe in made:
            with contextlib.suppress(OSError):  # another form of the same call
                probe.marker.rmdir()  # type: ignore[union-attr]
        return made

    def _not_repeatable(self, items: Sequence[AuditItem]) -> list[Finding]:
        """Whether items and scores are the same in processes with other seeds of hashes and of global random generators."""
        try:
            again = self._sampled(self.others)
        except (WorkerFailure, ReplyError) as error:
            return [self._changed("", f"a second process cannot make the items: {_line(error)}")]
        for index, (before, after) in enumerate(zip(items, again, strict=False)):
            if (before.question, before.gold) != (after.question, after.gold):
                what = "question" if before.question != after.question else "gold answer"
                return [self._changed("", f"item {index} has another {what} in a process with other seeds")]
        for index, item in enumerate(items):
            played = [one for one in self._outcomes if one.item == index and one.score and not one.probe.is_heavy]
            try:
                scores = self._scores(self.others, item, [one.probe for one in played], self._light_s)
            except (WorkerFailure, ReplyError) as error:
                self._unchecked.append(f"{self.task.name}: whether its scores repeat: {_line(error)}")
                return []
            finally:
                self._remove_markers([one.probe for one in played])
            for one, score in zip(played, scores, strict=True):
                if score != one.score:
                    earned = f"earns {_shown(one.score)} on item {index}, and {_shown(score)} with other seeds"
                    return [self._changed(one.probe.name, earned)]
        return []

    def _changed(self, probe: str, evidence: str) -> Finding:
        return finding(FindingKind.NOT_REPEATABLE, self.task.name, [(probe, evidence)])

    def _repeated(self, train: Sequence[str], held_out: Sequence[str]) -> list[Finding]:
        """Whether too many held-out questions are training questions."""
        repeated = [question for question in held_out if question in set(train)]
        if len(repeated) <= self.task.repeats * len(held_out):
            return []
        evidence = f"{len(repeated)} of {len(held_out)} held-out questions are among {len(train)} training questions"
        return [finding(FindingKind.REPEATS, self.task.name, [("", evidence)])]

    def _survey(self, split: str) -> list[tuple[str, Score | None]]:
        request = self.task.request("survey", split=split, num=self.task.num_surveyed)
        try:
            return read_survey(self.workers.call(request, self.settings.sample_timeout_s))
        except (WorkerFailure, ReplyError) as error:
            what = f"gold answers and repeated questions of the first {self.task.num_surveyed} {split} items"
            self._unchecked.append(f"{self.task.name}: {what}: {_line(error)}")
            return []


def _outcomes(index: int, played: Sequence[Probe], scores: Sequence[Score]) -> list[Outcome]:
    return [
        Outcome(index, probe, score)
        if score.error is None
        else Outcome(index, probe, None, FindingKind.RAISES, score.error)
        for probe, score in zip(played, scores, strict=True)
    ]


def _evaluated(outcome: Outcome) -> Outcome:
    return replace(outcome, fault=FindingKind.EVALUATES, detail="the code in the answer was executed")


def _fault(error: Exception) -> FindingKind:
    if isinstance(error, WorkerTimeout):
        return FindingKind.HANGS
    return FindingKind.DIES if isinstance(error, WorkerDied) else FindingKind.RAISES


def _shown(score: Score | None) -> str:
    return "nothing" if score is None or score.reward is None else f"{score.reward:g}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:MAX_DETAIL]
