"""Compares answers with math-verify. This runs in limited processes, see `math_answer.py`."""

from collections.abc import Callable

Comparison = Callable[[dict[str, str]], dict[str, object]]


def open_math_verify(_: object) -> Comparison:
    """Loads math-verify and its parser, which takes seconds, and returns `compare`."""
    compare({"gold": "1", "answer": "1"})
    return compare


def compare(request: dict[str, str]) -> dict[str, object]:
    """Compares a gold answer with another. The time limits of math-verify are off: the process has one."""
    from math_verify import parse, verify

    gold = parse(_as_math(_plain(request["gold"])), parsing_timeout=None)
    if not gold:
        return {"gold_error": "it contains no expression"}
    try:
        text = _plain(request["answer"])
        answer = parse(text, parsing_timeout=None) or parse(_as_math(text), parsing_timeout=None)
        return {"equal": verify(gold, answer, timeout_seconds=None)}
    except Exception as error:  # an answer that breaks the parser is wrong
        return {"equal": False, "error": type(error).__name__}


def _plain(text: str) -> str:
    """Removes dollar signs of currency and LaTeX's negative space, which math-verify does not read."""
    return text.replace("\\$", "").replace("\\!", "")


def _as_math(text: str) -> str:
    """Puts a text into a LaTeX environment, which math-verify requires."""
    return text if "$" in text or "\\boxed" in text else f"${text}$"
