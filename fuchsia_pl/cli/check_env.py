"""`fuchsia check-env`: does an environment pay for what it should, and survive what a policy may write?

Nothing is trained and no model is loaded, only its tokenizer. Texts are played in the policy's place through the collector that
training uses, so prompts, tools, reward functions and time limits are the real ones.
"""

import argparse
import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import ArgsType
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fuchsia_pl.cli.parts import PartsCLI
from fuchsia_pl.engines.base import Engine, EngineSpec, SamplingParams
from fuchsia_pl.envs.base import Environment, check_environment
from fuchsia_pl.rollouts.addressing import item_indices
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.rollouts.collector import Collector, Draw
from fuchsia_pl.types import Completion, Item, Rollout

GOLD, TRUNCATED = "gold", "truncated"
# What a policy, or somebody who wants its reward, may write. Each must end within the limits and earn less than the gold answer.
HOSTILE = {
    "empty": "",
    "spaces": " \n\t ",
    "power tower": "<answer>9**9**9</answer> \\boxed{9^{9^{9^9}}}",
    "brackets": "<answer>" + "(" * 10_000 + "</answer>",
    "unicode digits": "<answer>\u0667\u0662</answer>",
    "null bytes": "<answer>\x00\x00</answer>",
    "long": "<answer>" + "1234567 " * 131_072 + "</answer>",
    "nested call": '<tool_call>{"name": ' + "[" * 5_000 + "</tool_call>",
    "half a surrogate pair": '<tool_call>{"name": "python", "arguments": {"code": "\\ud83d"}}</tool_call>',
    "code": "<answer>__import__('os').system('true')</answer>",
    "special tokens": "<|im_end|><|im_start|>user\n<|endoftext|></s>",
}
COLLECT_TIMEOUT_S = 600.0


class PlayedEngine(Engine):
    """Says given turns in the policy's place, in one conversation at a time.

    Args:
        chat: The model's tokenizer.
    """

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.turns: Sequence[str] = ()
        self.is_cut = False
        self._num_said = 0

    @property
    def policy_version(self) -> int:
        """There are no weights."""
        return 0

    def start(self, spec: EngineSpec) -> None:
        """There is nothing to start."""

    def close(self) -> None:
        """There is nothing to close."""

    async def load_adapter(self, path: Path, version: int) -> None:
        """There is no adapter."""

    def play(self, turns: Sequence[str], is_cut: bool) -> None:
        """Sets what is said from now on.

        Args:
            turns: What a policy would write, turn by turn; the last one is repeated.
            is_cut: Whether it runs out of tokens in its last turn.
        """
        self.turns, self.is_cut, self._num_said = turns, is_cut, 0

    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """The next turn of the conversation."""
        number = min(self._num_said, len(self.turns) - 1)
        self._num_said += 1
        ids = self.chat.encode_turn(self.turns[number])
        stopped = not (self.is_cut and number == len(self.turns) - 1)
        ids = ids if stopped else ids[:-1]
        return Completion(tuple(ids), (-1.0,) * len(ids), "stop" if stopped else "length", None, 0)


@dataclass(frozen=True)
class Played:
    """What one text was worth on one item.

    Attributes:
        name: Of the text.
        item_index: Position of the item.
        rollout: What became of it, None where it stopped the run.
        seconds: How long that took.
        error: What stopped the run.
    """

    name: str
    item_index: int
    rollout: Rollout | None
    seconds: float
    error: str | None


class CheckEnvCLI(PartsCLI):
    """Of the parts, only the environment, the tokenizer and the lengths are used."""

    def __init__(self, args: ArgsType, num_items: int) -> None:
        self.num_items = num_items
        self.holds = False
        super().__init__(args)

    def use_parts(self) -> None:
        """Plays every text and reports what came of it."""
        data = self.datamodule
        console = Console(highlight=False)
        check_environment(data.environment)
        chat = Chat(data.served_model.folder)
        # A hostile text is played whole: what must hold out is the environment, not the length limit before it.
        sampling = replace(data.sampling, max_length=10**8, max_completion_tokens=10**7)
        played = asyncio.run(play_all(data.environment, chat, sampling, self.num_items, data.seed))
        self.holds = report(console, data.environment, played)


async def play_all(environment: Environment, chat: Chat, sampling: Any, num_items: int, seed: int) -> list[Played]:
    """Plays every text on some items.

    Args:
        environment: The environment.
        chat: The tokenizer.
        sampling: Lengths.
        num_items: How many items are drawn.
        seed: Of the draw.

    Raises:
        ConfigError: The environment cannot be prepared, or its items cannot be rendered.
    """
    engine = PlayedEngine(chat)
    collector = Collector(engine, environment, chat, sampling)
    try:
        await collector.prepare()
        items = environment.train_items()
        indices = item_indices(seed, 0, len(items), min(num_items, len(items)))
        collector.check_template(items[indices[0]])
        found = []
        for index in indices:
            found += [
                await play(collector, engine, items, index, name, turns)
                for name, turns in texts(environment, items[index])
            ]
        return found
    finally:
        await environment.close()


def texts(environment: Environment, item: Item) -> list[tuple[str, list[str]]]:
    """The turns to play on an item, by name: the gold ones if they are known, cut in the middle, and hostile ones."""
    gold = environment.gold_turns(item)
    known = [] if gold is None else [(GOLD, gold), (TRUNCATED, [*gold[:-1], gold[-1][: len(gold[-1]) // 2]])]
    return [*known, *((name, [text]) for name, text in HOSTILE.items())]


async def play(
    collector: Collector, engine: PlayedEngine, items: Sequence[Item], index: int, name: str, turns: list[str]
) -> Played:
    """Plays one text on one item."""
    engine.play(turns, is_cut=name == TRUNCATED)
    start = time.perf_counter()
    draw = Draw(items, [index], siblings=1, temperature=1.0, address=("check-env",), step=0)
    try:
        groups = await asyncio.wait_for(collector.collect(draw), COLLECT_TIMEOUT_S)
    except Exception as error:  # an environment may raise anything; here that is a finding, told in the table
        return Played(name, index, None, time.perf_counter() - start, f"{type(error).__name__}: {error}")
    return Played(name, index, groups[0][0], time.perf_counter() - start, None)


def findings(environment: Environment, played: Sequence[Played]) -> list[str]:
    """What does not hold, as sentences."""
    wrong = [f"{p.name!r} on item {p.item_index} stopped the run: {p.error}" for p in played if p.error is not None]
    wrong += [
        f"{p.name!r} on item {p.item_index} was not scored"
        for p in played
        if p.rollout is not None and p.rollout.reward is None
    ]
    for gold in (p for p in played if p.name == GOLD and p.rollout is not None and p.rollout.reward is not None):
        assert gold.rollout is not None
        if not environment.is_correct(gold.rollout):
            wrong.append(f"the gold answer of item {gold.item_index} does not count as right")
        for other in played:
            if other.item_index != gold.item_index or other is gold or other.rollout is None:
                continue
            reward = other.rollout.reward
            if reward is not None and gold.rollout.reward is not None and reward >= gold.rollout.reward:
                wrong.append(
                    f"{other.name!r} on item {gold.item_index} earns {reward:g}, no less than the gold answer's "
                    f"{gold.rollout.reward:g}"
                )
    return wrong


def report(console: Console, environment: Environment, played: Sequence[Played]) -> bool:
    """Prints a prompt, a table with a row for each text, and what does not hold; returns whether all holds."""
    shown = next((p.rollout for p in played if p.rollout is not None), None)
    if shown is not None:
        console.print(Panel(Text(shown.prompt), title=f"prompt of item {shown.item_index}"))
    table = Table("text", "items", "reward (lowest, highest)", "rewards of the first item", "ended", "seconds")
    for name in dict.fromkeys(p.name for p in played):
        table.add_row(*(Text(cell) for cell in _row(name, [p for p in played if p.name == name])))
    console.print(table)
    if not any(p.name == GOLD for p in played):
        console.print(
            "the gold answer is not known (override gold_turns): that it earns most was not checked", soft_wrap=True
        )
    wrong = findings(environment, played)
    for sentence in wrong:
        console.print(Text(f"does not hold: {sentence}"), soft_wrap=True)
    console.print(f"{type(environment).__name__}: " + (f"{len(wrong)} findings" if wrong else "holds"))
    return not wrong


def _row(name: str, played: Sequence[Played]) -> list[str]:
    rollouts = [p.rollout for p in played if p.rollout is not None]
    rewards = [r.reward for r in rollouts if r.reward is not None]
    ends = sorted({str(r.status) for r in rollouts} | {"error" for p in played if p.error is not None})
    counts = sorted({count for r in rollouts for count, number in r.counts.items() if number})
    by_name = rollouts[0].rewards.items() if rollouts else ()
    return [
        name,
        str(len(played)),
        f"{min(rewards):g}, {max(rewards):g}" if rewards else "none",
        ", ".join(f"{reward} {'none' if value is None else f'{value:g}'}" for reward, value in by_name),
        ", ".join([*ends, *counts]),
        f"{max(p.seconds for p in played):.1f}",
    ]


def check_env(arguments: list[str]) -> int:
    """Runs `fuchsia check-env`; returns the exit code, 0 where everything holds."""
    parser = argparse.ArgumentParser(
        prog="fuchsia check-env",
        description=__doc__,
        epilog="All other options are those of `fuchsia fit`; --debug shows the traceback of an error.",
        add_help=True,
    )
    parser.add_argument("--num-items", type=int, default=4, help="items to play on (default: 4)")
    given, rest = parser.parse_known_args(arguments)
    if given.num_items < 1:
        parser.error(f"--num-items must be 1 or more, got {given.num_items}")
    return 0 if CheckEnvCLI(["fit", *rest], given.num_items).holds else 1
