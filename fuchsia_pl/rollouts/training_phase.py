"""A phase of training on one rank: the items that are drawn, and the micro-batches that their rollouts become."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fuchsia_pl.batch import Batch, Denominators, StepInfo, TrainerSignals
from fuchsia_pl.envs.base import Environment, weights_at
from fuchsia_pl.envs.bounded import call_apart
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.rollouts.addressing import derived_seed
from fuchsia_pl.rollouts.batcher import (
    NO_ADVANTAGE,
    MicroBatch,
    count_over_ranks,
    make_batches,
    split_balanced,
    split_filled,
)
from fuchsia_pl.rollouts.choice import Choice
from fuchsia_pl.rollouts.collector import Draw
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.rollouts.credit import (
    changes_nothing,
    even_groups,
    kl_fraction,
    make_samples,
    penalise_overlong,
    signals_of,
)
from fuchsia_pl.rollouts.dynamic import Sampled
from fuchsia_pl.rollouts.metrics import PhaseCounts, over_ranks, step_fractions
from fuchsia_pl.rollouts.mini_batches import MiniBatch, split_rows
from fuchsia_pl.rollouts.part_collector import limited, own_group_sizes
from fuchsia_pl.rollouts.preparation import training_items
from fuchsia_pl.rollouts.ranks import Ranks
from fuchsia_pl.rollouts.staleness import drop_stale, oldest_version
from fuchsia_pl.rollouts.teacher import Teacher, teacher_fractions
from fuchsia_pl.samples import RolloutGroup, Sample

NO_COUNTS = Denominators(1, 1, 1, 1)  # where no loss is computed


def _of_one_rank(values: Tensor) -> Tensor:
    return values


def _no_teacher(batches: list[Batch]) -> list[Tensor]:
    raise AssertionError("there is no teacher")


@dataclass(frozen=True)
class Forward:
    """The trainer's forward pass, as far as a phase depends on it.

    Attributes:
        num_micro_batches: Micro-batches of an optimizer step; with a budget, as many as it may need.
        shares_prefix: Whether the common prefix of siblings is computed once.
        compute_signals: Computes logprobs, KL and critic values of micro-batches on the device.
        device: The trainer's device.
        max_tokens: Budget of tokens of a micro-batch, None without one.
        highest: Maximum of a tensor over all ranks.
        compute_teacher: Computes logprobs of a teacher whose weights the trainer has.

    >>> Forward(2, shares_prefix=False, compute_signals=lambda batches: []).split([])
    [[], []]
    >>> Forward(2, shares_prefix=False, compute_signals=lambda batches: [], max_tokens=8).split([])
    [None, []]
    """

    num_micro_batches: int
    shares_prefix: bool
    compute_signals: Callable[[list[Batch]], list[TrainerSignals]]
    device: torch.device | str = "cpu"
    max_tokens: int | None = None
    highest: Callable[[Tensor], Tensor] = _of_one_rank
    compute_teacher: Callable[[list[Batch]], list[Tensor]] = _no_teacher

    def split(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        """Splits rows into exactly `num_micro_batches` micro-batches. All ranks have to call it at the same time.

        With a budget, rows are packed into as few micro-batches as they fill, and all ranks agree on the largest number. The
        others are None and come first: gradients are exchanged in the last one. If the rows fill more than there may be, they
        are divided evenly.
        """
        number = self.num_micro_batches
        if self.max_tokens is None:
            return [*split_balanced(samples, number, self.shares_prefix)]
        filled = split_filled(samples, self.max_tokens, self.shares_prefix)
        num_used = min(int(self.highest(torch.tensor(max(len(filled), 1)))), number)
        if len(filled) > number:
            filled = split_balanced(samples, number, self.shares_prefix)
        padding: list[MicroBatch] = [[] for _ in range(num_used - len(filled))]
        # The fullest is the last one, which the sync's probe takes.
        return [*(None for _ in range(number - num_used)), *padding, *reversed(filled)]

    def signals(self, batches: list[Batch]) -> list[TrainerSignals]:
        """Logprobs, KL and critic values of micro-batches."""
        return self.compute_signals([batch.to(self.device) for batch in batches])

    def of_teacher(self, batches: list[Batch]) -> list[TrainerSignals]:
        """Logprobs of the teacher for micro-batches of rows as it reads them."""
        computed = self.compute_teacher([batch.to(self.device) for batch in batches])
        return [TrainerSignals(None, None, teacher_logprobs=logprobs) for logprobs in computed]


@dataclass(frozen=True)
class TrainingPhase:
    """Settings of a run that determine its training phases. It has no state and does not use the trainer.

    Attributes:
        environment: Its items are drawn; its rewards are weighted.
        loss: The objective.
        sampling: Settings of sampling.
        seed: The run's seed.
        num_too_long: Training items that are never drawn because their prompts are too long.
        ranks: This rank and the others.
        teacher: Scores what the policy has sampled; None without one.
    """

    environment: Environment
    loss: LossConfig
    sampling: SamplingConfig
    seed: int
    num_too_long: int
    ranks: Ranks
    teacher: Teacher | None = None

    def draw(self, phase: int, choice: Choice) -> tuple[Draw, list[int]]:
        """This rank's items of a phase, and the items that may replace groups without spread, in order.

        Args:
            phase: Number of the phase.
            choice: The items of all ranks.
        """
        items = training_items(self.environment)
        draw = Draw(
            items=items,
            indices=self.ranks.share(choice.drawn),
            siblings=self.sampling.group_size,
            temperature=self.sampling.temperature,
            address=(self.seed, "train", phase),
            step=phase * self.loss.steps_per_phase,
            group_sizes=own_group_sizes(self.environment, items, [*choice.drawn, *choice.spare]),
        )
        return draw, self.ranks.share(choice.spare)

    def batches(self, sampled: Sampled, step: int, served_version: int, forward: Forward) -> list[Batch]:
        """Micro-batches of all optimizer steps of a phase, in order: all mini-batches once, then all of them again.

        Args:
            sampled: This rank's groups. The penalty of overlong completions is added to their rewards.
            step: The phase's first optimizer step.
            served_version: The engine's policy version, used where nothing was sampled.
            forward: The trainer's forward pass.

        Raises:
            RewardError: An advantage is not finite.
        """
        version = min((r.policy_version for r in sampled.rollouts if r.all_turns), default=served_version)
        self._penalise_overlong(sampled.groups)
        signals = self._signals(sampled.kept, step, version, forward)
        weights = call_apart(weights_at, self.environment, step)
        teacher_weight = 0.0 if self.teacher is None else self.teacher.weight
        made = make_samples(self.loss, sampled.kept, weights, signals, self.ranks.add_up, teacher_weight)
        samples = drop_stale(made, step, self.sampling.max_staleness)
        version = oldest_version(samples, version, self.ranks.lowest)
        num_zero = sum(changes_nothing(self.loss, sample) for sample in samples)
        num_trained = sum(sample.is_first for sample in samples)
        kl, of_teacher = kl_fraction(sampled.kept, signals), self._teacher_fractions(sampled.kept, signals)
        num_stale = sum(sample.is_first for sample in made) - num_trained  # all rows of a rollout are dropped together
        counts = PhaseCounts(sampled, num_trained, num_zero, self.num_too_long, kl, num_stale, teacher=of_teacher)
        fractions = call_apart(step_fractions, counts, self.environment, self.ranks.size)
        metrics = {**over_ranks(fractions, self.ranks.add_up), **sampled.choice_metrics}
        phase = StepInfo(step, NO_COUNTS, version, self.sampling.max_staleness, metrics)
        steps = []
        for number, rows in enumerate(split_rows(sampled.kept, samples, self.loss.mini_batches)):
            info = replace(phase, step=step + number, phase_step=number)
            steps.append(self._step_batches(rows, sampled.dropped if number == 0 else [], info, forward))
        return self._updates(steps)

    def _step_batches(
        self, rows: MiniBatch, dropped: Sequence[RolloutGroup], info: StepInfo, forward: Forward
    ) -> list[Batch]:
        """The micro-batches of a mini-batch, with the facts of its step.

        Args:
            rows: This rank's rows.
            dropped: Groups that dynamic sampling dropped, for the logs of this step.
            info: The record of the step without the counts of its rows.
            forward: The trainer's forward pass.
        """
        zero = tuple(sample for sample in rows.samples if changes_nothing(self.loss, sample))
        effective = [sample for sample in rows.samples if not changes_nothing(self.loss, sample)]
        denominators, skip_reason = count_over_ranks(
            rows.samples, effective, self.sampling.max_completion_tokens, self.ranks.add_up
        )
        if skip_reason == NO_ADVANTAGE and self.teacher is not None:
            skip_reason += ", and the teacher gives all tokens the policy's probabilities"
        unused = (*rows.unused, *(rollout for group in dropped for rollout in group.rollouts))
        info = replace(info, denominators=denominators, skip_reason=skip_reason, unused=unused, zero_advantage=zero)
        return make_batches(forward.split(effective), info)

    def _updates(self, steps: Sequence[Sequence[Batch]]) -> list[Batch]:
        """The micro-batches of all mini-batches once for each pass, each with its own dropout seed.

        Args:
            steps: The micro-batches of each mini-batch.
        """
        found = []
        for number in range(self.loss.num_policy_updates):
            for batches in steps:
                info = batches[0].step.in_pass(number, len(steps))
                if info.phase_step == 0:
                    info = replace(info, later=tuple(batch for others in steps[1:] for batch in others))
                for place, batch in enumerate(batches):
                    seed = derived_seed(self.seed, "dropout", self.ranks.rank, info.step, place)
                    found.append(replace(batch, step=info, dropout_seed=seed))
        return found

    def _signals(self, groups: Sequence[RolloutGroup], step: int, version: int, forward: Forward) -> TrainerSignals:
        """What advantages need beside the rewards, for all sampled tokens; each None where nothing needs it."""
        if self.teacher is None and not self.loss.needs_signals:
            return TrainerSignals(None, None)
        batches = self._batches_before_credit(groups, step, version, forward)
        signals = signals_of(groups, batches, forward.signals(batches))
        if self.teacher is None:
            return signals
        if self.teacher.score is not None:
            return replace(signals, teacher_logprobs=self.teacher.scores(groups))
        rows = self.teacher.rows(groups)
        batches = self._batches_before_credit(rows, step, version, forward)
        of_teacher = signals_of(rows, batches, forward.of_teacher(batches))
        return replace(signals, teacher_logprobs=of_teacher.teacher_logprobs)

    def _teacher_fractions(
        self, groups: Sequence[RolloutGroup], signals: TrainerSignals
    ) -> Mapping[str, tuple[float, float]]:
        if self.teacher is None:
            return {}
        rollouts = [rollout for group in even_groups(groups) for rollout in group.rollouts]
        lengths = torch.tensor([rollout.num_sampled_tokens for rollout in rollouts], dtype=torch.int64)
        return teacher_fractions(signals, lengths, self.teacher.weight)

    def _batches_before_credit(
        self, groups: Sequence[RolloutGroup], step: int, version: int, forward: Forward
    ) -> list[Batch]:
        """Micro-batches of all rollouts without advantages, from which signals are computed."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        samples = [
            Sample(rollout, (0.0,) * row.num_sampled_tokens, row_number=number)
            for rollout in rollouts
            for number, row in enumerate(rollout.rows)
        ]
        info = StepInfo(step, NO_COUNTS, version)
        # A micro-batch of all rollouts would be as many times larger than one that is trained as there are mini-batches.
        parts = split_rows(groups, samples, self.loss.mini_batches)
        used = [part for rows in parts for part in forward.split(rows.samples) if part is not None]
        return make_batches(used, info)

    def _penalise_overlong(self, groups: Sequence[RolloutGroup]) -> None:
        """Adds the penalty of overlong completions by the limit of each group's own part."""
        of_parts: dict[str, list[RolloutGroup]] = {}
        for group in groups:
            of_parts.setdefault(group.rollouts[0].part, []).append(group)
        for name, own in of_parts.items():
            config = limited(self.sampling, self.environment.mixed[name]) if name else self.sampling
            penalise_overlong(self.loss, own, config.max_completion_tokens)
