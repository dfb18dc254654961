"""Samples rollouts: one coroutine each, so that a slow one never holds up the others."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from fuchsia_pl.engines.base import Engine
from fuchsia_pl.envs.base import Environment
from fuchsia_pl.rollouts.addressing import derived_seed
from fuchsia_pl.rollouts.bounded import call_bounded
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.rollouts.scoring import score_group
from fuchsia_pl.types import ConfigError, Item, Rollout, RolloutStatus, SamplingParams, Turn


class PromptTooLongError(ConfigError):
    """A prompt leaves no room for the completion."""


class EnvironmentStepError(RuntimeError):
    """An environment's `step_rollout` raised, hung, or did not end the interaction."""


@dataclass(frozen=True)
class Draw:
    """Which items are sampled, how often and how.

    Attributes:
        items: The split's rows.
        indices: Positions of the rows to sample.
        siblings: Rollouts per row.
        temperature: Sampling temperature.
        address: Where in the run this is, the start of every request's seed: (run seed, split, step).
    """

    items: Sequence[Item]
    indices: list[int]
    siblings: int
    temperature: float
    address: tuple[int | str, ...]


class Collector:
    """Runs the rollouts of a draw against an engine.

    Args:
        engine: Who samples.
        environment: What is asked and how answers are scored.
        chat: The model's chat template.
        config: Lengths.
    """

    def __init__(self, engine: Engine, environment: Environment, chat: Chat, config: SamplingConfig) -> None:
        self.engine = engine
        self.environment = environment
        self.chat = chat
        self.config = config

    async def collect(self, draw: Draw) -> list[list[Rollout]]:
        """Samples and scores all groups of a draw.

        Returns:
            For each index of the draw its siblings, in order.

        Raises:
            PromptTooLongError: An item's prompt leaves no room for a completion of the configured length.
            EnvironmentStepError: `step_rollout` failed.
            RewardError: A reward function failed.
            EngineError: The engine failed.
        """
        prompts = [self._prompt(draw.items, index) for index in draw.indices]
        groups = (self._group(draw, index, ids) for index, ids in zip(draw.indices, prompts, strict=True))
        return list(await asyncio.gather(*groups))

    def check_prompts(self, items: Sequence[Item]) -> None:
        """Renders the prompts of a whole split, so that one that is too long is found before anything is sampled.

        Raises:
            PromptTooLongError: A prompt leaves no room for a completion of the configured length.
        """
        for index in range(len(items)):
            self._prompt(items, index)

    def _prompt(self, items: Sequence[Item], index: int) -> list[int]:
        ids = self.chat.render(self.environment.messages(items[index]))
        room = self.config.max_length - self.config.max_completion_tokens
        if len(ids) > room:
            raise PromptTooLongError(
                f"the prompt of item {index} has {len(ids)} tokens, and data.sampling.max_length={self.config.max_length} leaves "
                f"{room} beside max_completion_tokens={self.config.max_completion_tokens}: raise max_length, lower "
                "max_completion_tokens, or leave that item out of the environment"
            )
        return ids

    async def _group(self, draw: Draw, index: int, prompt_ids: list[int]) -> list[Rollout]:
        prompt = self.chat.raw_text(prompt_ids)
        rollouts = [
            Rollout(draw.items[index], index, sibling, draw.temperature, prompt) for sibling in range(draw.siblings)
        ]
        await asyncio.gather(*(self._run(draw, rollout, prompt_ids) for rollout in rollouts))
        await score_group(self.environment, rollouts)
        return rollouts

    async def _run(self, draw: Draw, rollout: Rollout, prompt_ids: list[int]) -> None:
        rollout.start(prompt_ids)
        sampling = SamplingParams(
            temperature=draw.temperature,
            max_tokens=self.config.max_completion_tokens,
            seed=derived_seed(*draw.address, rollout.item_index, rollout.sibling),
            stop=tuple(self.environment.stop),
            stop_token_ids=self.chat.stop_token_ids,
        )
        completion = await self.engine.generate(rollout.token_ids, sampling)
        rollout.append(Turn(completion, self.chat.text(completion.token_ids)))
        if completion.finish_reason == "length":
            rollout.finish(RolloutStatus.TRUNCATED)
            return
        await self._step(rollout)

    async def _step(self, rollout: Rollout) -> None:
        where = f"{type(self.environment).__name__}.step_rollout on item {rollout.item_index}"
        try:
            await call_bounded(self.environment.step_rollout, rollout, self.environment.timeout_s)
        except TimeoutError as error:
            raise EnvironmentStepError(f"{where} took longer than {self.environment.timeout_s} s") from error
        except Exception as error:  # whatever an environment raises is passed on with its item
            raise EnvironmentStepError(f"{where} raised {type(error).__name__}: {error}") from error
        if rollout.status is None:
            raise EnvironmentStepError(f"{where} did not call rollout.finish(): an interaction has one turn for now")
