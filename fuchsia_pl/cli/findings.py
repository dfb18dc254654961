"""Faults of an environment, as sentences: one for each fault, also if several texts show it."""

import ast
import json
import re
import traceback
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

from fuchsia_pl.cli.played import GOLD, Played
from fuchsia_pl.envs.base import Environment
from fuchsia_pl.envs.conversation import conversation
from fuchsia_pl.envs.user_code import user_code
from fuchsia_pl.types import Item

MAX_CHARS = 400  # characters of a sentence: some error messages contain the whole text
NUM_NAMED = 3  # maximum number of texts or items that a sentence names
MAX_LITERAL_CHARS = 100_000
# A message, or an object without a `__str__`, that was converted to text.
WRITTEN_OBJECT = re.compile(r"\{'role': ?'|<[\w.]+ object at 0x[0-9a-f]+>")


def findings(environment: Environment, played: Sequence[Played]) -> list[str]:
    """The faults that the results show, one sentence for each."""
    found: dict[Hashable, list[tuple[str, Played]]] = defaultdict(list)
    for one in played:
        for key, sentence in [*_failures(one), *_against_gold(environment, one, played)]:
            found[key].append((sentence, one))
    all_names = {one.name for one in played}
    return [
        one_line(f"{_texts([p for _, p in shown], all_names)}: {shown[0][0]}{_items([p for _, p in shown], played)}")
        for shown in found.values()
    ]


def written_objects(environment: Environment, items: Sequence[Item], positions: Iterable[int], place: str) -> list[str]:
    """A sentence if prompts look like Python objects that were converted to text."""
    contents = {index: _written_object(environment, items[index]) for index in positions}
    wrong = {index: content for index, content in contents.items() if content is not None}
    if not wrong:
        return []
    first, example = next(iter(wrong.items()))
    number = f"{len(wrong)} prompts look" if len(wrong) > 1 else "1 prompt looks"
    return [
        one_line(
            f"{number} like a Python object that was made a text, first that of {place} {first}: {shortened(example, 60)}. "
            "Return its text, or the conversation itself, from messages(item)"
        )
    ]


def is_written_object(text: str) -> bool:
    """Whether a text looks like a Python object that `str` was called on.

    >>> is_written_object("[{'role': 'user', 'content': '3 plus 4?'}]"), is_written_object("None")
    (True, True)
    >>> is_written_object("Sort [3, 1, 2]."), is_written_object("[3, 1, 2]"), is_written_object("{'a': 1}['a'] is what?")
    (False, False, False)
    """
    text = text.strip()
    if text in ("None", "nan") or WRITTEN_OBJECT.search(text):
        return True
    if text[:1] not in tuple("[{(") or len(text) > MAX_LITERAL_CHARS:
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return _is_literal(text)
    return False  # JSON is also the form of data in prompts


def shortened(text: str, limit: int) -> str:
    """A text of at most about `limit` characters; the middle of a longer one is left out.

    >>> shortened("abcdefghij", 4)
    'ab … ij'
    """
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-(limit // 2) :]}"


def one_line(text: str) -> str:
    r"""A text as one line of bounded length.

    >>> one_line("a\n  b")
    'a b'
    """
    return shortened(" ".join(text.split()), MAX_CHARS)


def _failures(one: Played) -> list[tuple[Hashable, str]]:
    if one.error is not None:
        return [(_origin(one.error), f"stops the run: {_reason(one.error)}")]
    if any(rollout.reward is None for rollout in one.rollouts):
        return [("unscored", "is not scored by any reward function")]
    return []


def _against_gold(environment: Environment, one: Played, played: Sequence[Played]) -> list[tuple[Hashable, str]]:
    """Faults of a text compared with the gold answer of the same item, or of the gold answer itself."""
    gold = next((p for p in played if p.name == GOLD and p.place == one.place and p.rewards), None)
    if gold is None or not one.rewards:
        return []
    if one is gold:
        with user_code(f"{type(environment).__name__}.is_correct"):
            is_right = all(environment.is_correct(rollout) for rollout in one.rollouts)
        return [] if is_right else [("wrong gold", "does not count as right")]
    if max(one.rewards) < min(gold.rewards):
        return []
    return [
        (
            "no less",
            f"earns {max(one.rewards):g}, no less than the gold answer's {min(gold.rewards):g}",
        )
    ]


def _origin(error: Exception) -> Hashable:
    """The origin of an error: errors of the same kind at the same line are one fault."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    frames = traceback.extract_tb(cause.__traceback__)
    return type(cause), frames[-1].filename if frames else "", frames[-1].lineno if frames else 0


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _texts(shown: Sequence[Played], all_names: set[str]) -> str:
    names = list(dict.fromkeys(one.name for one in shown))
    if len(names) == 1:
        return f"on the text {names[0]!r}" if len(all_names) > 1 else "on the only text"
    if len(names) == len(all_names):
        return f"on all {len(names)} texts"
    return f"on {len(names)} of {len(all_names)} texts ({_first(map(repr, names))})"


def _items(shown: Sequence[Played], played: Sequence[Played]) -> str:
    """The items on which a fault shows; "" if it shows on all."""
    places = list(dict.fromkeys(one.place for one in shown))
    return "" if len(places) == len({one.place for one in played}) else f" ({_first(places)})"


def _first(words: Iterable[str]) -> str:
    named = list(words)
    return ", ".join(named[:NUM_NAMED]) + (", …" if len(named) > NUM_NAMED else "")


def _written_object(environment: Environment, item: Item) -> str | None:
    """The content of the first message of an item that looks like a written object."""
    contents = (str(message["content"]) for message in conversation(environment.messages, item))
    return next((content for content in contents if is_written_object(content)), None)


def _is_literal(text: str) -> bool:
    try:
        return isinstance(ast.literal_eval(text), list | dict | tuple | set)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
