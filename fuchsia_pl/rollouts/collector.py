"""Samples rollouts. Each has its own coroutine, so that a slow one does not delay the others."""

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from fuchsia_pl.engines.base import Engine, SamplingParams
from fuchsia_pl.envs.base import Environment
from fuchsia_pl.envs.conversation import conversation
from fuchsia_pl.envs.rows import place_of
from fuchsia_pl.envs.self_driven import SelfDrivenEnvironment
from fuchsia_pl.envs.thinking import Opaque, ends_in_opening_mark, ends_in_thinking, without_thinking
from fuchsia_pl.progress import HELD_OUT, SAMPLING, Activity, progress
from fuchsia_pl.rollouts import calls
from fuchsia_pl.rollouts.addressing import derived_seed
from fuchsia_pl.rollouts.calls import EnvironmentStepError, call_method
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.rollouts.prompt import Prompt
from fuchsia_pl.rollouts.requests import hand_over
from fuchsia_pl.rollouts.scoring import score_group
from fuchsia_pl.types import Completion, ConfigError, Item, Message, Rollout, RolloutStatus, Turn

T = TypeVar("T")
RESPONSE = "some response"  # placeholder for a response of an environment
MARK_TOKENS = 16  # number of last tokens of a header that may contain an opening mark of thinking
MAX_CONTINUATIONS = 16  # of one turn after stop strings; the rest is then sampled without stop strings
logger = logging.getLogger(__name__)


class PromptTooLongError(ConfigError):
    """A prompt is so long that a completion does not fit."""


@dataclass(frozen=True)
class Draw:
    """Items to sample, and how to sample them.

    Attributes:
        items: The split's rows.
        indices: Positions of the rows to sample.
        siblings: Rollouts per row.
        temperature: Sampling temperature.
        address: Position in the run, the first part of every request's seed: (run seed, split, phase).
        step: The optimizer step that the rollouts are for, None on a held-out split.
        activity: Counts finished rollouts; None for a draw whose sampling is an activity of its own.
        group_sizes: Rollouts of the rows that have another number than `siblings`, by position.
    """

    items: Sequence[Item]
    indices: list[int]
    siblings: int
    temperature: float
    address: tuple[int | str, ...]
    step: int | None = None
    activity: Activity | None = None
    group_sizes: Mapping[int, int] = field(default_factory=dict)

    def siblings_of(self, index: int) -> int:
        """Rollouts of a row."""
        return self.group_sizes.get(index, self.siblings)

    def num_rollouts(self, indices: Sequence[int]) -> int:
        """Rollouts of some rows."""
        return sum(self.siblings_of(index) for index in indices)


class Collector:
    """Runs the rollouts of a draw against an engine.

    Args:
        engine: Engine that generates completions.
        environment: Conversations and rewards.
        chat: The model's chat template.
        config: Settings of sampling, such as lengths.
    """

    def __init__(self, engine: Engine, environment: Environment, chat: Chat, config: SamplingConfig) -> None:
        self.engine = engine
        self.environment = environment
        self.chat = chat
        self.config = config

    async def prepare(self) -> None:
        """Prepares the environment and sets the format in which the policy calls its tools.

        Raises:
            ConfigError: The environment has no working tools, or the model's template cannot render its conversation.
            ToolServerError: A tool server does not run.
            EnvironmentStepError: `prepare` timed out or tried to end the process.
        """
        environment = self.environment
        await calls.prepare(environment)
        environment.tool_convention = self.chat.convention(environment.tools)

    def check_template(self, items: Sequence[Item], index: int) -> None:
        """Checks before sampling that the template can render the environment's responses.

        Args:
            items: The split's rows.
            index: Position of the row that is rendered.

        Raises:
            ConfigError: With the template's reason, or the item has no prompt.
        """
        environment = self.environment
        if environment.max_steps == 1:
            return
        response = {"role": environment.tool_convention.role, "content": RESPONSE}
        messages = self.messages_of(items[index], place_of(items, index))
        ids = self.chat.bridge(messages, [response], None, self._template_tools)
        if RESPONSE not in self.chat.raw_text(ids):
            raise ConfigError(
                f"the model's chat template leaves out the text of a response with the role {response['role']!r}: use another "
                "template (model.policy.chat_template) or another model"
            )
        if self.chat.rewrites_earlier_turns:
            logger.warning(
                "the model's chat template changes earlier turns (some templates leave thinking out). Here the policy continues "
                "from its turns as it wrote them: their ids are kept and never rendered again"
            )

    async def collect(self, draw: Draw) -> list[list[Rollout]]:
        """Samples and scores all groups of a draw.

        Returns:
            The siblings of each index of the draw, in order.

        Raises:
            PromptTooLongError: An item's prompt leaves no room for a completion of the configured length.
            EnvironmentStepError: A method of the environment failed.
            RewardError: A reward function failed.
            EngineError: The engine failed.
            ToolServerError: A tool server cannot be started again.
            LeftThreadsError: User code leaves too many threads behind.
        """
        await self.prepare()
        prompts = [self.prompt(draw.items, index) for index in draw.indices]
        with counted(draw) as counting:
            return await gather_or_cancel(self._group(counting, prompt) for prompt in prompts)

    def fitting(self, items: Sequence[Item], split: str) -> dict[int, int]:
        """Renders the prompts of a whole split, so that missing or too long prompts are found before sampling.

        Args:
            items: The split's rows.
            split: Its name, for error messages.

        Returns:
            Number of prompt tokens by position, for the items whose prompts leave room for a completion.

        Raises:
            PromptTooLongError: A prompt leaves no room, and `long_prompts` is "refuse".
            ConfigError: An item has no prompt, or the template cannot render it. The message names the item.
        """
        found = {}
        with progress.activity(f"rendering {split} prompts", len(items), "prompts") as activity:
            for index in range(len(items)):
                number = self.num_prompt_tokens(items, index, split)
                if number is not None:
                    found[index] = number
                activity.advance()
        return found

    def num_prompt_tokens(self, items: Sequence[Item], index: int, split: str) -> int | None:
        """Number of tokens of an item's prompt; None if it leaves no room and is to be dropped. Else as `fitting`."""
        try:
            return len(self._render(items[index], place_of(items, index), f"{split} ")[1])
        except PromptTooLongError:
            if self.config.long_prompts == "refuse":
                raise
            return None

    def prompt(self, items: Sequence[Item], index: int) -> Prompt:
        """Makes the prompt of an item. Calls the environment's `messages` once.

        Args:
            items: The split's rows.
            index: Position of the row.

        Raises:
            PromptTooLongError: It leaves no room for a completion of the configured length.
            ConfigError: The item has no prompt, or the template cannot render it.
        """
        item = items[index]
        messages, ids = self._render(item, place_of(items, index))
        return Prompt(item, index, tuple(messages), tuple(ids), self.chat.raw_text(ids))

    def _render(self, item: Item, place: str, split: str = "") -> tuple[list[Message], list[int]]:
        """Messages and token ids of an item's prompt. Error messages contain `place`, most of them after `split`."""
        messages = self.messages_of(item, f"{split}{place}")
        ids = self.ids_of(messages, f"{split}{place}")
        room = self.config.max_length - self.config.max_completion_tokens
        if len(ids) > room:
            raise PromptTooLongError(
                f"the prompt of {place} has {len(ids)} tokens, and "
                f"data.sampling.max_length={self.config.max_length} leaves {room} beside "
                f"max_completion_tokens={self.config.max_completion_tokens}: raise max_length, lower "
                'max_completion_tokens, or set data.sampling.long_prompts to "drop"'
            )
        return messages, ids

    def messages_of(self, item: Item, where: str) -> list[Message]:
        """The conversation of an item.

        Args:
            item: The item.
            where: Its place, for errors.

        Raises:
            ConfigError: The item has no prompt.
        """
        try:
            return conversation(self.environment.messages, item)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    def ids_of(self, messages: list[Message], where: str) -> list[int]:
        """The ids of a prompt, with the environment's tools.

        Args:
            messages: The conversation.
            where: Place of its item, for errors.

        Raises:
            ConfigError: The template cannot render it.
        """
        try:
            return self.chat.render(messages, self.environment.tools, self.environment.tool_convention)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    @property
    def _template_tools(self) -> Sequence[Any]:
        return self.environment.tools if self.environment.tool_convention.is_native else ()

    async def _group(self, draw: Draw, prompt: Prompt) -> list[Rollout]:
        rollouts = [
            prompt.rollout(sibling, draw.temperature, draw.step) for sibling in range(draw.siblings_of(prompt.index))
        ]
        await gather_or_cancel(self._run(draw, rollout) for rollout in rollouts)
        await score_group(self.environment, rollouts)
        return rollouts

    async def _run(self, draw: Draw, rollout: Rollout) -> None:
        environment = self.environment
        try:
            try:
                await call_method(environment, environment.open_rollout, rollout, environment.timeout_s)
                if isinstance(environment, SelfDrivenEnvironment):
                    await hand_over(self, draw, rollout)
                else:
                    await self._converse(draw, rollout)
            finally:
                await call_method(environment, environment.close_rollout, rollout, environment.timeout_s)
        except EnvironmentStepError as error:
            if environment.on_error == "stop":
                raise
            logger.warning("%s", error)
            rollout.finish(RolloutStatus.ENV_ERROR)
        if draw.activity is not None:
            draw.activity.advance()

    async def _converse(self, draw: Draw, rollout: Rollout) -> None:
        """Samples turns until the environment ends the interaction, or tokens or turns run out."""
        environment, prompt = self.environment, list(rollout.messages)
        for turn in range(environment.max_steps):
            room = min(
                self.config.max_completion_tokens - rollout.num_sampled_tokens,
                self.config.max_length - len(rollout.token_ids),
            )
            if room < 1:
                break
            rollout.append(await self.sample_turn(draw, rollout, turn, room))
            completion = rollout.turns[-1].completion
            ids = completion.token_ids
            if completion.finish_reason == "length":
                break
            responses = await self._step(rollout)
            if rollout.status is not None:
                return
            if turn + 1 < environment.max_steps:
                last_id = ids[-1] if ids else None
                rollout.append_environment(self.chat.bridge(prompt, responses, last_id, self._template_tools))
        rollout.finish(RolloutStatus.TRUNCATED)

    async def sample_turn(self, draw: Draw, rollout: Rollout, turn: int, room: int) -> Turn:
        """Samples a turn after the ids of a rollout, and does not change the rollout.

        Args:
            draw: How to sample.
            rollout: The rollout.
            turn: Number of the turn, a part of its seed.
            room: Most tokens of the turn.
        """
        starts_in_thinking = self._starts_in_thinking(rollout)
        completion = await self._generate(draw, rollout, turn, room, starts_in_thinking)
        return self._turn(completion, starts_in_thinking)

    async def _generate(
        self, draw: Draw, rollout: Rollout, turn: int, room: int, starts_in_thinking: bool
    ) -> Completion:
        """Samples a turn. A turn that a stop string ended inside of thinking or of a call's JSON is continued.

        Each continuation has its own seed and the remaining tokens of the turn's `room`.
        """
        completion = await self.engine.generate(rollout.token_ids, self._sampling(draw, rollout, (turn,), room))
        number = 0
        while isinstance(completion.stop_reason, str) and self._is_cut(completion, starts_in_thinking):
            left, number = room - len(completion.token_ids), number + 1
            if left < 1:
                return replace(completion, finish_reason="length", stop_reason=None)
            sampling = self._sampling(draw, rollout, (turn, number), left)
            if number >= MAX_CONTINUATIONS:
                sampling = replace(sampling, stop=())
            prompt_ids = [*rollout.token_ids, *completion.token_ids]
            completion = completion.followed_by(await self.engine.generate(prompt_ids, sampling))
        return completion

    def _is_cut(self, completion: Completion, starts_in_thinking: bool) -> bool:
        """Whether a turn's ids end inside of thinking or of a call's JSON."""
        environment, raw_text = self.environment, self.chat.turn_text(completion.token_ids)
        if ends_in_thinking(raw_text, environment.thinking_marks, starts_in_thinking, self._calls):
            return True
        answer = without_thinking(raw_text, environment.thinking_marks, starts_in_thinking, self._calls)
        return bool(environment.tools) and environment.tool_convention.read(answer, environment.tools).is_cut

    @property
    def _calls(self) -> Opaque | None:
        """The parts of a turn in which marks of thinking are ignored."""
        tools = self.environment.tools
        return self.environment.tool_convention.opaque(tools) if tools else None

    def _starts_in_thinking(self, rollout: Rollout) -> bool:
        """Whether the header of the policy's turn ends with an opening mark of thinking."""
        tail = self.chat.raw_text(rollout.token_ids[-MARK_TOKENS:])
        return ends_in_opening_mark(tail, self.environment.thinking_marks)

    def _turn(self, completion: Completion, starts_in_thinking: bool) -> Turn:
        ids, marks = completion.token_ids, self.environment.thinking_marks
        # Some models' marks are special tokens, which `text` does not contain. So the raw text is searched for thinking.
        raw_text = self.chat.turn_text(ids)
        raw_answer = without_thinking(raw_text, marks, starts_in_thinking, self._calls)
        text = self.chat.text(ids)
        answer = text if raw_answer == raw_text else self.chat.without_special_tokens(raw_answer)
        return Turn(completion, text, raw_text, answer, raw_answer)

    def _sampling(self, draw: Draw, rollout: Rollout, turn: tuple[int, ...], max_tokens: int) -> SamplingParams:
        """Parameters of a turn, or of a continuation (turn, number). The address of the first turn has no number."""
        address = (*draw.address, rollout.item_index, rollout.sibling)
        return SamplingParams(
            temperature=draw.temperature,
            max_tokens=max_tokens,
            seed=derived_seed(*address, *(turn if turn != (0,) else ())),
            stop=(*self.environment.stop, *(self.environment.tool_convention.stop if self.environment.tools else ())),
            stop_token_ids=self.chat.stop_token_ids,
        )

    async def _step(self, rollout: Rollout) -> list[Message]:
        environment = self.environment
        await call_method(environment, environment.step_rollout, rollout, environment.step_timeout_s)
        responses = rollout.take_responses(environment.max_response_chars)
        if rollout.status is None and not responses:
            raise EnvironmentStepError(
                f"{type(environment).__name__}.step_rollout on item {rollout.item_index} called neither "
                "rollout.respond(text) nor rollout.finish()"
            )
        return responses


@contextmanager
def counted(draw: Draw) -> Iterator[Draw]:
    """Yields a draw with an activity that counts its rollouts: its own one, or a new one inside the `with` block."""
    if draw.activity is not None:
        yield draw
        return
    name = HELD_OUT if draw.step is None else SAMPLING
    with progress.activity(name, draw.num_rollouts(draw.indices), "rollouts") as activity:
        yield replace(draw, activity=activity)


async def gather_or_cancel(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Returns all results in order. If one fails, the others are cancelled and awaited, and the error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as errors:
        raise _first(errors) from None
    return [task.result() for task in tasks]


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
