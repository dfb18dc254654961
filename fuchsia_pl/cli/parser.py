"""An argument parser whose errors are short and say which key was probably meant."""

import difflib
import re
import sys
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

# jsonargparse's ways to say that a key is unknown: on the command line, in a config, and inside a class in either.
UNKNOWN_KEY = re.compile(
    r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'|Option '([\w.]+)' is not accepted"
)
PARSER_KEY = re.compile(r'Parser key "([\w.]+)"')


class SuggestingParser(LightningArgumentParser):
    """LightningArgumentParser without abbreviations, and with the nearest known key in errors about unknown ones."""

    def __init__(self, **kwargs: Any) -> None:
        # An abbreviated key would be accepted today and mean another once a new key starts with it.
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program with the message, the probable key, and where all keys are listed."""
        parser = _failed_parser(self, ex)
        sys.stderr.write(f"error: {message}\n")
        nearest = nearest_key(message, parser.known_keys())
        if nearest:
            sys.stderr.write(f"Did you mean {nearest!r}?\n")
        sys.stderr.write(f"All keys: {parser.prog.replace(' [options]', '')} --help\n")
        sys.exit(2)

    def known_keys(self) -> set[str]:
        """Every dotted key that this parser takes, the arguments of the classes it knows included."""
        keys = {action.dest for action in self._actions}
        for group in self._action_groups:
            keys |= {action.dest for action in group._group_actions}
        return {key for key in keys if key and key != "help"}


def _failed_parser(parser: SuggestingParser, ex: Exception | None) -> SuggestingParser:
    """The subcommand's parser, where jsonargparse says that the error is one of its arguments'."""
    failed = ex.__dict__.get("subcommand_parser") if ex is not None else None
    return failed if isinstance(failed, SuggestingParser) else parser


def nearest_key(message: str, known: set[str]) -> str | None:
    """The known key most like the unknown one in an error message, None where no key is unknown or none is like it.

    >>> nearest_key("unrecognized arguments: --model.polcy.name x", {"model.policy.name", "data.seed"})
    'model.policy.name'
    """
    found = UNKNOWN_KEY.search(message)
    if found is None:
        return None
    unknown = next(group for group in found.groups() if group)
    inside = PARSER_KEY.search(message)
    if inside is not None:
        unknown = f"{inside.group(1)}.{unknown}"
    matches = difflib.get_close_matches(unknown, sorted(known), n=1, cutoff=0.6)
    return matches[0] if matches else None
