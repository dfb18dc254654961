"""Which settings may be secret, by their names and by the look of their values."""

import re
from collections.abc import Sequence
from typing import Any

# Under environment, engine and loggers, whose settings may be anything. Elsewhere names such as `max_completion_tokens` are ours.
SECRET_NAME = re.compile(r"key|token(?!s|_ids)|secret|passw|credential|auth|cookie|header", re.IGNORECASE)
# User and password in an address, and the beginnings of common keys.
SECRET_TEXT = re.compile(
    r"://[^/\s]*@|\b(sk|pk|hf|ghp|gho|glpat|xox[abp]|AKIA)[-_]?[A-Za-z0-9]{8}|-----BEGIN|\bBearer\s"
)
# A value after a name in a query or an option: "?api_key=x", "--token=x".
ASSIGNED = re.compile(r"(?:[?&;]|^--?|\s--?)[\w-]*(?:key|token|secret|passw\w*|auth)=", re.IGNORECASE)
OPTION = re.compile(r"--?[\w-]*(?:key|token|secret|passw\w*|auth)$", re.IGNORECASE)


def may_be_secret(value: str) -> bool:
    """Whether a text looks like a key, or contains a password or a named secret.

    >>> may_be_secret("hf_abcdefghijkl"), may_be_secret("https://h/mcp?api_key=x"), may_be_secret("--token=x")
    (True, True, True)
    >>> may_be_secret("a.jsonl"), may_be_secret("What is the key?")
    (False, False)
    """
    return SECRET_TEXT.search(value) is not None or ASSIGNED.search(value) is not None


def follows_option(values: Sequence[Any], position: int) -> bool:
    """Whether the value before a position in a command line is an option such as `--api-key`.

    >>> follows_option(["server", "--api-key", "x"], 2), follows_option(["server", "x"], 1), follows_option(["x"], 0)
    (True, False, False)
    """
    return position > 0 and OPTION.fullmatch(str(values[position - 1])) is not None
