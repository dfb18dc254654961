"""Examines an environment: the checks of the start of a run, then rollouts with fixed texts as the policy's output."""

from dataclasses import dataclass, field, replace

from fuchsia_pl.cli.findings import findings, one_line, written_objects
from fuchsia_pl.cli.played import GOLD, Played, PlayedEngine, RememberingChat, Split, hostile_turns, known_turns, play
from fuchsia_pl.datamodule import CLOSE_TIMEOUT_S, RolloutDataModule
from fuchsia_pl.envs.base import Environment
from fuchsia_pl.envs.parts import by_part, members
from fuchsia_pl.rollouts.addressing import item_indices
from fuchsia_pl.rollouts.budget import check_budget, longest_row
from fuchsia_pl.rollouts.calls import close
from fuchsia_pl.rollouts.flags import HELD_OUT_FLAGS, Limits
from fuchsia_pl.rollouts.part_collector import collector_for
from fuchsia_pl.rollouts.preparation import (
    as_config_error,
    check_shares,
    held_out_items,
    held_out_prompts,
    training_items,
    training_prompts,
)
from fuchsia_pl.types import ConfigError

# Hostile texts are not cut: they test the environment, not the length limit before it.
MAX_LENGTH = 10**8


@dataclass(frozen=True)
class Run:
    """Settings of the run that its first checks use, besides the data module.

    Attributes:
        num_ranks: Ranks that share the items, as far as the config determines it.
        max_tokens: Most tokens of a micro-batch, None without a limit.
        held_out: The number (int) or the share (float) of the held-out items that the run uses; 0 uses none.

    >>> Run(num_ranks=1, max_tokens=None, held_out=1.0).num_ranks
    1
    """

    num_ranks: int
    max_tokens: int | None
    held_out: int | float


@dataclass
class Examination:
    """Results for an environment.

    Attributes:
        environment: The environment.
        num_items: Training items that a run may draw.
        num_too_long: Training items that are left out as too long.
        num_held_out: Held-out items that a run uses, None if the split cannot be used.
        played: The results of each text on each item.
        wrong: Faults, as sentences.
        unchecked: Optional properties that could not be checked, as sentences.

    >>> class Empty(Environment):
    ...     def step_rollout(self, rollout): ...
    >>> Examination(Empty()).wrong
    []
    """

    environment: Environment
    num_items: int = 0
    num_too_long: int = 0
    num_held_out: int | None = None
    played: list[Played] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


class Examiner:
    """Examines the environment of a data module.

    Args:
        data: The environment, the model and the lengths.
        run: The rest of the run.
        num_items: Training items to play on.

    Raises:
        ConfigError: The model's tokenizer cannot be used.
    """

    def __init__(self, data: RolloutDataModule, run: Run, num_items: int) -> None:
        self.data = data
        self.run = run
        self.num_items = num_items
        chat = RememberingChat(data.make_chat())
        self._engine = PlayedEngine(chat)
        self._asked = collector_for(self._engine, data.environment, chat, data.sampling)
        unlimited = replace(data.sampling, max_length=MAX_LENGTH, max_completion_tokens=MAX_LENGTH // 10)
        self._collector = collector_for(self._engine, data.environment, chat, unlimited)

    async def examine(self) -> Examination:
        """Makes the checks of the start of a run, then plays every text on some training items and on one held-out item.

        Raises:
            ConfigError: The environment cannot be prepared, or no prompts can be made of its training items.
        """
        environment = self.data.environment
        found = Examination(environment)
        # Here an error in the environment's code is a finding, with any value of `on_error`.
        given = [(member, member.on_error) for member in members(environment)]
        for member, _ in given:
            member.on_error = "stop"
        try:
            check_shares(self.data.batch_size, self.run.num_ranks, self.data.loss.mini_batches)
            with as_config_error(f"{type(environment).__name__}.prepare"):
                await self._asked.prepare()
            await self._examine_training(found)
            await self._examine_held_out(found)
        finally:
            for member, on_error in given:
                member.on_error = on_error
            with as_config_error(f"{type(environment).__name__}.close"):
                await close(environment, CLOSE_TIMEOUT_S)
        found.wrong += findings(environment, found.played)
        if not any(one.name == GOLD for one in found.played):
            found.unchecked.append("that the gold answer earns most, since it is not known (override gold_turns)")
        return found

    async def _examine_training(self, found: Examination) -> None:
        data = self.data
        prompts = training_prompts(self._asked, data.seed, data.batch_size)
        if self.run.max_tokens is not None:
            row = longest_row(prompts.values(), data.sampling, has_turns=data.environment.max_steps > 1)
            check_budget(row, self.run.max_tokens)
        items, positions = training_items(data.environment), list(prompts)
        found.num_items, found.num_too_long = len(positions), len(items) - len(positions)
        found.wrong += written_objects(data.environment, items, positions, "item")
        split = Split(items, "item", data.sampling.group_size, data.sampling.temperature, step=0)
        for own in by_part(items, positions).values():
            for place in item_indices(data.seed, 0, len(own), min(self.num_items, len(own))):
                await self._play_on(found, split, own[place])

    async def _examine_held_out(self, found: Examination) -> None:
        environment = self.data.environment
        try:
            positions = held_out_prompts(self._asked, self.run.num_ranks)
            if self.run.held_out:
                limits = Limits(1, None, self.run.held_out, HELD_OUT_FLAGS["fit"], self.run.held_out)
                positions = limits.first_held_out(positions, self.run.num_ranks)
        except ConfigError as error:
            if self.run.held_out:
                found.wrong.append(one_line(str(error)))
            else:
                found.unchecked.append(
                    one_line(f"the held-out split, which trainer.limit_val_batches=0 leaves out: {error}")
                )
            return
        items = held_out_items(environment)
        found.num_held_out = len(positions)
        found.wrong += written_objects(environment, items, positions, "held-out item")
        temperature = self.data.sampling.validation_temperature
        for own in by_part(items, positions).values():
            await self._play_on(found, Split(items, "held-out item", 1, temperature, step=None), own[0])

    async def _play_on(self, found: Examination, split: Split, index: int) -> None:
        """Plays every text on one item."""
        known = []
        try:
            known = known_turns(self.data.environment, split.items[index])
        except ConfigError as error:
            found.wrong.append(one_line(f"{split.place} {index}: {error}"))
        for name, turns in [*known, *hostile_turns()]:
            found.played.append(await play(self._collector, self._engine, split, index, name, turns))
