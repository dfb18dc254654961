"""The process in which answers are compared; a script that `math_answer.py` starts. A request and a reply are a line each."""

import json
import resource
import signal
import sys

from math_verify import parse, verify

MEMORY_BYTES = 2 * 2**30


def main() -> None:
    """Answers requests until the other side closes the pipe."""
    timeout_s = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    # The other side kills a comparison that takes too long; should it be gone, this does.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, timeout_s + 1.0)
        sys.stdout.write(json.dumps(reply(json.loads(line))) + "\n")
        sys.stdout.flush()
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def reply(request: dict[str, str]) -> dict[str, object]:
    """Compares a gold answer with another. Their own time limits are off: they would take the alarm that is set here."""
    gold = parse(_as_math(_plain(request["gold"])), parsing_timeout=None)
    if not gold:
        return {"gold_error": "it finds no expression in it"}
    try:
        text = _plain(request["answer"])
        answer = parse(text, parsing_timeout=None) or parse(_as_math(text), parsing_timeout=None)
        return {"equal": verify(gold, answer, timeout_seconds=None)}
    except Exception as error:  # whatever a policy writes: an answer that breaks the parser is no right answer
        return {"equal": False, "error": type(error).__name__}


def _plain(text: str) -> str:
    """Text without dollar signs that are money and without LaTeX's negative space, which math-verify does not read."""
    return text.replace("\\$", "").replace("\\!", "")


def _as_math(text: str) -> str:
    """math-verify reads LaTeX only in an environment."""
    return text if "$" in text or "\\boxed" in text else f"${text}$"


if __name__ == "__main__":
    main()
