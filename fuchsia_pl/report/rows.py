"""A line of the log of rollouts as a row of the page.

The text of a policy is hostile. Here it is only cut and put into JSON; nothing interprets it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fuchsia_pl.envs.tools.convention import PLAIN
from fuchsia_pl.envs.tools.reading import TurnCalls, read_bare, read_tagged
from fuchsia_pl.report.values import MAX_TEXT_CHARS, number, numbers, text, whole

TRAIN = "train"
MAX_ITEM_CHARS = 4000
ROW_BYTES = 400  # of a row without its texts, roughly
NOTHING = "null"

Key = tuple[str, int, int, str]  # split, step, item and environment: one group of siblings
Part = dict[str, Any]


@dataclass
class Row:
    """A row of a rollout in the page; most rollouts are one row.

    The columns of its tokens are JSON texts, so that millions of tokens need no objects.

    Attributes:
        sibling: Position of its rollout in the group.
        number: Number of the row in its rollout.
        reward: The rollout's reward; None if it is not scored.
        fields: Values of the page, without indices into its tables.
        rewards: Value of each reward function by name.
        columns: For each part, the texts and advantages of its tokens as JSON.
        sizes: For each part, its number of sampled tokens.
        gaps: For each part, the gaps of its tokens as JSON; empty until they are known.

    >>> Row(0, 0, 1.0, {}, {}, ['["2"]'], [NOTHING], [1]).token_data
    '[[["2"],null,null]]'
    """

    sibling: int
    number: int
    reward: float | None
    fields: dict[str, Any]
    rewards: dict[str, float | None]
    tokens: list[str]
    advantages: list[str]
    sizes: list[int]
    gaps: list[str] = field(default_factory=list)

    @property
    def token_data(self) -> str:
        """For each part, its tokens, advantages and gaps, as one JSON text."""
        gaps = self.gaps or [NOTHING] * len(self.tokens)
        columns = zip(self.tokens, self.advantages, gaps, strict=True)
        return f"[{','.join(f'[{texts},{advantages},{gap}]' for texts, advantages, gap in columns)}]"

    @property
    def num_bytes(self) -> int:
        """Size in the page before it is compressed, roughly."""
        texts = sum(len(part["text"]) for part in self.fields["parts"])
        return ROW_BYTES + texts + sum(map(len, (*self.tokens, *self.advantages, *self.gaps)))

    def add_gaps(self, gaps: list[Any]) -> None:
        """Adds the gaps of all sampled tokens. A number of gaps that does not fit is of another rollout, and is left out."""
        if len(gaps) != sum(self.sizes):
            return
        self.gaps = [
            NOTHING if texts == NOTHING else _packed(column)
            for texts, column in zip(self.tokens, _split(numbers(gaps), self.sizes), strict=True)
        ]


def key_of(line: Mapping[str, Any], split: str) -> Key:
    """The group of a line. Training steps are counted from 1 in the page, and held-out ones are the steps before."""
    step = whole(line.get("step")) + (split == TRAIN)
    return split, step, whole(line.get("item_index")), text(line.get("environment"), 200)


def row_of(line: Mapping[str, Any], split: str) -> Row:
    """The row of a line of the log, of this version or of an older one without tokens."""
    rewards, row_number = line.get("rewards"), whole(line.get("row"))
    parts, turn_of = _parts(line)
    if row_number:  # its prompt is not the one of the group
        prompt: Part = {"role": "prompt", "policy": False, "text": text(line.get("prompt"))}
        parts, turn_of = [prompt, *parts], [None, *turn_of]
    tokens, sizes = _tokens(line, turn_of)
    advantages = numbers(line.get("advantages"))
    if len(advantages) == sum(sizes):
        columns = zip(tokens, _split(advantages, sizes), strict=True)
        packed = [NOTHING if texts == NOTHING else _packed(column) for texts, column in columns]
    else:
        packed = [NOTHING] * len(parts)
    sibling, reward = whole(line.get("sibling")), number(line.get("reward"))
    fields = {
        "split": split,
        "step": key_of(line, split)[1],
        "item": whole(line.get("item_index")),
        "sibling": sibling,
        "row": row_number,
        "status": text(line.get("status"), 100),
        "reward": reward,
        "advantage": number(line.get("advantage")),
        "version": whole(line.get("policy_version")),
        "parts": parts,
    }
    named = {str(name): number(value) for name, value in rewards.items()} if isinstance(rewards, dict) else {}
    by_turn = line.get("turn_rewards")
    if isinstance(by_turn, dict) and by_turn:
        fields["turn_rewards"] = {str(name): numbers(values) for name, values in by_turn.items()}
    return Row(sibling, row_number, reward, fields, named, tokens, packed, sizes)


def item_text(line: Mapping[str, Any]) -> str:
    """The item of a line as JSON text."""
    return text(json.dumps(line.get("item"), ensure_ascii=False), MAX_ITEM_CHARS)


def _parts(line: Mapping[str, Any]) -> tuple[list[Part], list[int | None]]:
    """The conversation after the prompt, and for each part the number of its turn; None for text of the environment."""
    messages = _answered(line)
    parts: list[Part] = []
    turn_of: list[int | None] = []
    turn = 0
    for position, message in enumerate(messages):
        is_policy, content = message["role"] == "assistant", text(message["content"])
        part: Part = {"role": message["role"], "policy": is_policy, "text": content}
        following = messages[position + 1]["role"] if position + 1 < len(messages) else ""
        calls = list(_calls(message["content"], following)) if is_policy and following else []
        parts += [{**part, "call": calls[0]} if calls else part]
        parts += [{"role": "assistant", "policy": True, "text": "", "call": call} for call in calls[1:]]
        turn_of += [turn if is_policy else None, *([None] * len(calls[1:]))]
        turn += is_policy
    return parts, turn_of


def _answered(line: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages after the prompt: those from the first turn of the policy on.

    The prompt may have assistant messages too. The number of turns is that of `tokens`. Lines of older versions do not have it;
    there, the texts of the turns are together the completion.
    """
    given, completion = line.get("messages"), str(line.get("completion") or "")
    messages = [
        {"role": str(message.get("role")), "content": str(message.get("content") or "")}
        for message in (given if isinstance(given, list) else [])
        if isinstance(message, dict)
    ]
    turns, rest = line.get("tokens"), completion
    missing = len(turns) if isinstance(turns, list) else None
    for start in range(len(messages) - 1, -1, -1):
        if missing == 0 or (missing is None and not rest):
            return messages[start + 1 :]
        if messages[start]["role"] != "assistant":
            continue
        if missing is not None:
            missing -= 1
        elif rest.endswith(messages[start]["content"]):
            rest = rest.removesuffix(messages[start]["content"])
        else:
            break
        if missing == 0 or (missing is None and not rest):
            return messages[start:]
    return [{"role": "assistant", "content": completion}] if completion else []


def _tokens(line: Mapping[str, Any], turn_of: Sequence[int | None]) -> tuple[list[str], list[int]]:
    """For each part, the texts of its tokens as JSON and their number. A text that was cut has no tokens."""
    given = line.get("tokens")
    turns = [turn if isinstance(turn, list) else [] for turn in given] if isinstance(given, list) else []
    columns, sizes = [], []
    for turn in turn_of:
        texts = turns[turn] if turn is not None and turn < len(turns) else []
        # A token may be longer than its text: special tokens are left out of texts.
        is_whole = bool(texts) and sum(len(str(piece)) for piece in texts) <= MAX_TEXT_CHARS
        columns.append(_packed([str(piece) for piece in texts]) if is_whole else NOTHING)
        sizes.append(len(texts))
    return columns, sizes


def _calls(said: str, following: str) -> Iterator[dict[str, str]]:
    """The tool calls of a turn that the environment answered."""
    found = TurnCalls((), is_cut=False)
    if PLAIN.opening in said:
        found = read_tagged(said, PLAIN.opening, PLAIN.closing, [])
    elif following == "tool":
        found = read_bare(said, [])
    for call in found.calls:
        arguments = call.error or json.dumps(call.arguments, ensure_ascii=False)
        yield {"name": text(call.name, 200), "arguments": text(arguments)}


def _split(values: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """Values in pieces of these sizes.

    >>> _split([1, 2, 3], [2, 0, 1])
    [[1, 2], [], [3]]
    """
    ends = [sum(sizes[: position + 1]) for position in range(len(sizes))]
    return [list(values[end - size : end]) for end, size in zip(ends, sizes, strict=True)]


def _packed(values: Sequence[Any]) -> str:
    """ASCII, which represents a lone surrogate too."""
    return json.dumps(list(values), separators=(",", ":"))
