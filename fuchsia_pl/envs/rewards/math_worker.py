"""Script of the process that compares answers, started by `math_answer.py`. Each request and each reply is one line."""

import json
import resource
import signal
import sys

from math_verify import parse, verify

MEMORY_BYTES = 2 * 2**30


def main() -> None:
    """Replies to requests until the parent process closes the pipe."""
    timeout_s = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    # The parent process kills a comparison at its time limit. If the parent has ended, the alarm kills it.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, timeout_s + 1.0)
        sys.stdout.write(json.dumps(reply(json.loads(line))) + "\n")
        sys.stdout.flush()
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def reply(request: dict[str, str]) -> dict[str, object]:
    """Compares a gold answer with another. The time limits of math-verify are off: they would replace the alarm of `main`."""
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


if __name__ == "__main__":
    main()
