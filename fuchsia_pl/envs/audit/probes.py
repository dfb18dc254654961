"""Texts that an audit plays in place of a policy's answer."""

import re
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from pathlib import Path

from fuchsia_pl.envs.audit.task import AuditItem

MANY = 10_000
MAX_NUMBER_CHARS = 60  # longer texts are not compared as numbers
NUMBER = re.compile(r"[+-]?[0-9]+(?:\.[0-9]*|/[0-9]+)?")


class ProbeKind(StrEnum):
    """What a probe is, and so what it may earn. One that contains the gold answer may earn as much."""

    GOLD = "gold"
    EMPTY = "empty"
    JUNK = "junk"
    CUT = "cut"
    WITH_GOLD = "with gold"


@dataclass(frozen=True)
class Probe:
    """A text that a policy may write.

    Attributes:
        name: Name of the text in findings.
        kind: What it is.
        turns: The policy's turns.
        marker: A folder that exists afterwards if the answer was evaluated, None if the text makes none.
        is_heavy: Whether the reward may hang on it, or need much memory.

    >>> Probe("empty turn", ProbeKind.EMPTY, ("",)).marker is None
    True
    """

    name: str
    kind: ProbeKind
    turns: tuple[str, ...]
    marker: Path | None = None
    is_heavy: bool = False


# Answers that are right by chance at most.
CONSTANTS = ("0", "1", "-1", "nan", "inf", "True", "False", "None", "null", "yes", "no", "[]", "{}", "[[]]", "A", "x")
# Answers that rewards read wrongly: too deep, too long, too large, or not what a check of characters suggests.
HOSTILE = {
    "spaces": " \n\t ",
    "separators": "=,:;|/",
    "half a pair": "1=",
    "three parts": "1=2=3",
    "colons": "1:2:3:4",
    "placeholders": "{0.__class__} %s %d %",
    "backslashes": "\\1 \\g<0> \\x \\",
    "division by zero": "1/0",
    "superscript digit": "\u00b2",
    "other digits": "\u0667\u0662",
    "null bytes": "\x00\x00",
    "half surrogate": "\ud83d",
    "json of numbers": '[1, [2, null], {"a": 1}]',
    "json object": '{"a": {"b": [1]}, "c": null}',
    "json text": '"a"',
    "json of lists": "[[1, 2], [3]]",
    "json of texts": '[["a", "b"], "c"]',
    "json of nulls": "[[null]]",
    "large number": "1e400",
    "fraction of signs": "-/-",
}
# Answers on which a reward may hang, or need much memory. Each is scored in a process of its own.
HEAVY = {
    "round brackets": "(" * MANY,
    "square brackets": "[" * MANY,
    "closed brackets": "[" * MANY + "]" * MANY,
    "braces": '{"a":' * MANY,
    "signs": "-" * MANY + "1",
    "negations": "not " * MANY + "1",
    "million digits": "9" * 10**6,
    "huge exponent": "1e1000000000",
    "small exponent": "1e-1000000000",
    "huge power": "10**10**9",
    "tower": "9**9**9**9",
    "caret tower": "9^9^9^9",
    "factorials": "9!!!!",
    "long text": "1234567 " * 2**17,
    "long line": "ab" * 2**19,
    "many lines": "1 0\n" * 2**16,
}
# Code whose effect shows that it was executed. The name of a folder has letters and "_" alone: rewards that look for numbers or
# change capitals do not change it. There is no space and no comma in a call, since answers are often split there.
CALL = "__import__('os').mkdir('PATH')"
CALLS = {
    "call": CALL,
    "call in a list": f"[{CALL}]",
    "call and number": f"{CALL}+0",
    "call after a name": f"x={CALL}",
    "call before a result": f"{CALL}=0",
    "call in lines": f"1\n{CALL}",
    "call after numbers": f"1,2,{CALL}",
    "call that ends a text": f'"+{CALL}+"',
    "call in an f-string": 'f\'{__import__("os").mkdir("PATH")}\'',
}
CALL_AFTER_GOLD = "call after the gold answer"
# Words for the two answers of a question of yes or no.
SAME = (frozenset({"true", "1", "yes"}), frozenset({"false", "0", "no"}))


def probes(item: AuditItem, folder: Path) -> list[Probe]:
    """All probes for an item, the gold answer first.

    Args:
        item: The item.
        folder: An empty folder in which executed code makes folders. Its path should have letters and "_" alone.

    Returns:
        The probes without those that equal the gold answer.
    """
    found = [Probe("empty turn", ProbeKind.EMPTY, (*item.before, ""))]
    if item.gold is not None:
        turns = item.turns(item.forms[0], item.gold)
        found.insert(0, Probe("gold", ProbeKind.GOLD, turns))
        found.append(Probe("cut-off turn", ProbeKind.CUT, (*item.before, turns[-1][: len(turns[-1]) // 2])))
    for number, form in enumerate(item.forms):
        for probe in _answers(item, folder):
            name = f"{probe.name} (form {number + 1})" if number else probe.name
            found.append(replace(probe, name=name, turns=item.turns(form, probe.turns[-1])))
    return found


def is_gold(answer: str, gold: str) -> bool:
    """Whether an answer equals the gold answer as a text or as a number.

    >>> is_gold(" TRUE", "true"), is_gold("1", "1.0"), is_gold("1/2", "0.5"), is_gold("0", "no"), is_gold("nan", "1")
    (True, True, True, True, False)
    """
    one, other = _plain(answer), _plain(gold)
    if one == other or any({one, other} <= same for same in SAME):
        return True
    if max(len(one), len(other)) > MAX_NUMBER_CHARS:
        return False
    number = _number(one)
    return number is not None and number == _number(other)


def is_near(answer: str, gold: str) -> bool:
    """Whether an answer is a number within a hundredth of the gold answer, as that of which digits are cut off.

    >>> is_near("3.1415", "3.14159265"), is_near("3", "3.14"), is_near("x", "y")
    (True, False, False)
    """
    one, other = _number(_plain(answer)[:MAX_NUMBER_CHARS]), _number(_plain(gold)[:MAX_NUMBER_CHARS])
    return one is not None and other is not None and abs(one - other) * 100 <= abs(other)


def _answers(item: AuditItem, folder: Path) -> list[Probe]:
    """The probes that are answers, as turns without a form."""
    gold = item.gold
    found = [Probe("empty answer", ProbeKind.EMPTY, ("",)), Probe("the question", ProbeKind.JUNK, (item.question,))]
    found += [Probe(repr(text), ProbeKind.JUNK, (text,)) for text in CONSTANTS]
    found += [Probe(name, ProbeKind.JUNK, (text,)) for name, text in HOSTILE.items()]
    found += [Probe(name, ProbeKind.JUNK, (text,), is_heavy=True) for name, text in HEAVY.items()]
    calls = [(name, ProbeKind.JUNK, text) for name, text in CALLS.items()]
    if gold is not None:
        found.append(Probe("cut-off answer", ProbeKind.CUT, (gold[: len(gold) // 2],)))
        calls.append((CALL_AFTER_GOLD, ProbeKind.WITH_GOLD, f"{gold}+{CALL}"))
    for name, kind, text in calls:
        marker = folder / name.replace(" ", "_").replace("-", "_")
        found.append(Probe(name, kind, (text.replace("PATH", str(marker)),), marker))
    if gold is None:
        return found
    return [
        probe
        for probe in found
        if not is_gold(probe.turns[-1], gold) and not (probe.kind is ProbeKind.CUT and is_near(probe.turns[-1], gold))
    ]


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip("\"'`[](){}<>. ")


def _number(text: str) -> Fraction | None:
    if not NUMBER.fullmatch(text):
        return None
    try:
        return Fraction(text)
    except ZeroDivisionError:
        return None
