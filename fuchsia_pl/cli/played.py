"""Plays fixed texts as the policy's output, through the collector that training uses."""

import asyncio
import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fuchsia_pl.engines.base import Engine, EngineSpec, SamplingParams
from fuchsia_pl.envs.base import Environment
from fuchsia_pl.envs.user_code import user_code
from fuchsia_pl.evaluation.measures import graded
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.rollouts.collector import Collector, Draw
from fuchsia_pl.rollouts.metrics import reward_fractions
from fuchsia_pl.rollouts.preparation import as_config_error
from fuchsia_pl.types import Completion, ConfigError, Item, Rollout

GOLD, TRUNCATED = "gold", "truncated"
# Texts that a policy may write. Each rollout must end within the limits and get less reward than the gold answer.
HOSTILE = {
    "empty": "",
    "spaces": " \n\t ",
    "power tower": "<answer>9**9**9</answer> \\boxed{9^{9^{9^9}}}",
    "brackets": "<answer>" + "(" * 10_000 + "</answer>",
    "unicode digits": "<answer>\u0667\u0662</answer>",
    "null bytes": "<answer>\x00\x00</answer>",
    "long": "<answer>" + "1234567 " * 131_072 + "</answer>",
    "nested call": '<tool_call>{"name": ' + "[" * 5_000 + "</tool_call>",
    "half surrogate": '<tool_call>{"name": "python", "arguments": {"code": "\\ud83d"}}</tool_call>',
    "code": "<answer>__import__('os').system('true')</answer>",
    "special tokens": "<|im_end|><|im_start|>user\n<|endoftext|></s>",
}
COLLECT_TIMEOUT_S = 600.0
# All siblings have the same text, and the longest takes a second to encode and a second to decode.
NUM_REMEMBERED = 16
# Each sibling's conversation runs in its own task, and so in its own context.
_turns_played: ContextVar[int] = ContextVar("turns_played", default=0)


class RememberingChat(Chat):
    """Encodes and decodes a text once for all of its siblings.

    Args:
        chat: The model's tokenizer and chat template.
    """

    def __init__(self, chat: Chat) -> None:
        vars(self).update(vars(chat))  # the same tokenizer and template
        self._encoded = lru_cache(NUM_REMEMBERED)(super().encode_turn)
        self._decoded = lru_cache(NUM_REMEMBERED)(super().text)
        self._raw = lru_cache(NUM_REMEMBERED)(super().raw_text)

    def encode_turn(self, text: str) -> list[int]:
        """The ids of a turn, its end included."""
        return self._encoded(text)

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of ids without special tokens."""
        return self._decoded(tuple(token_ids))

    def raw_text(self, token_ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return self._raw(tuple(token_ids))


class PlayedEngine(Engine):
    """Returns given turns as completions, the same turns for each sibling.

    Args:
        chat: The model's tokenizer.
    """

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.turns: Sequence[str] = ()
        self.is_cut = False

    @property
    def policy_version(self) -> int:
        """Always 0: there are no weights."""
        return 0

    def start(self, spec: EngineSpec) -> None:
        """Does nothing: there is nothing to start."""

    def close(self) -> None:
        """Does nothing: there is nothing to close."""

    async def load_weights(self, path: Path, version: int) -> None:
        """Does nothing: there is no adapter."""

    def play(self, turns: Sequence[str], is_cut: bool) -> None:
        """Sets the turns of the conversations that start from now on.

        Args:
            turns: The text of each turn; the last one is repeated.
            is_cut: Whether the last turn reaches the token limit.
        """
        self.turns, self.is_cut = turns, is_cut

    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """The next turn of the conversation."""
        number = min(_turns_played.get(), len(self.turns) - 1)
        _turns_played.set(number + 1)
        ids = self.chat.encode_turn(self.turns[number])
        stopped = not (self.is_cut and number == len(self.turns) - 1)
        ids = ids if stopped else ids[:-1]
        return Completion(tuple(ids), (-1.0,) * len(ids), "stop" if stopped else "length", None, 0)

    async def score(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """The constant logprob of every id."""
        return (-1.0,) * (len(token_ids) - 1)


@dataclass(frozen=True)
class Played:
    """A group of siblings with the same text, on one item.

    Attributes:
        name: Name of the text.
        place: The item as a report names it: "item 3".
        rollouts: The siblings; none if the text stopped the run.
        seconds: Duration.
        error: The exception that stopped the run, if any.

    >>> Played("empty", "item 3", (), 0.1, None).rewards
    []
    """

    name: str
    place: str
    rollouts: tuple[Rollout, ...]
    seconds: float
    error: Exception | None

    @property
    def rewards(self) -> list[float]:
        """The totals of the siblings that were scored."""
        return [rollout.reward for rollout in self.rollouts if rollout.reward is not None]


@dataclass(frozen=True)
class Split:
    """The items on which texts are played, and the sampling there.

    Attributes:
        items: The rows.
        place: The beginning of the name of an item.
        siblings: Rollouts of an item.
        temperature: Sampling temperature.
        step: The optimizer step, None on a held-out split.

    >>> Split([{"n": 1}], "held-out item", siblings=1, temperature=0.0, step=None).siblings
    1
    """

    items: Sequence[Item]
    place: str
    siblings: int
    temperature: float
    step: int | None


def known_turns(environment: Environment, item: Item) -> list[tuple[str, list[str]]]:
    """The gold turns of an item, and the same cut in the middle, by name; [] if they are not known.

    Raises:
        ConfigError: `gold_turns` raised, or did not return a list of texts.
    """
    where = f"{type(environment).__name__}.gold_turns"
    with as_config_error(where), user_code():
        gold = environment.gold_turns(item)
    if gold is None:
        return []
    if not isinstance(gold, list) or not gold or not all(isinstance(turn, str) for turn in gold):
        raise ConfigError(f"{where} returned {gold!r:.100}: it must return a list of texts, one for each turn, or None")
    return [(GOLD, gold), (TRUNCATED, [*gold[:-1], gold[-1][: len(gold[-1]) // 2]])]


def hostile_turns() -> list[tuple[str, list[str]]]:
    """The turns that must get less reward than the gold answer, by name."""
    return [(name, [text]) for name, text in HOSTILE.items()]


async def play(
    collector: Collector, engine: PlayedEngine, split: Split, index: int, name: str, turns: list[str]
) -> Played:
    """Plays one text on one item, and computes the metrics that a run computes from its rollouts."""
    engine.play(turns, is_cut=name == TRUNCATED)
    start, place = time.perf_counter(), f"{split.place} {index}"
    draw = Draw(split.items, [index], split.siblings, split.temperature, ("check-env", split.place), split.step)
    try:
        (rollouts,) = await asyncio.wait_for(collector.collect(draw), COLLECT_TIMEOUT_S)
        reward_fractions(rollouts, collector.environment, world_size=1)
        graded(rollouts, collector.environment)
    except Exception as error:  # an environment may raise anything; here that is a finding
        return Played(name, place, (), time.perf_counter() - start, error)
    return Played(name, place, tuple(rollouts), time.perf_counter() - start, None)
