"""An argument parser with short errors that suggest the right key."""

import re
import sys
from argparse import ArgumentError
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from fuchsia_pl.cli.commands import HELP_ALL_OPTION, HELP_OPTIONS
from fuchsia_pl.cli.failures import made
from fuchsia_pl.cli.unknown_keys import unknown_keys

# Error messages of jsonargparse for an unknown key: on the command line, in a config, and inside a class in either.
UNKNOWN_KEY = re.compile(
    r"unrecognized arguments: |does not accept option '|Option '[^']+' is not accepted|No action for key"
)
MISSING_KEY = "the following arguments are required: "  # that of a required key without a value


class SuggestingParser(LightningArgumentParser):
    """LightningArgumentParser that takes no abbreviations and reports all unknown keys at once."""

    def __init__(self, **kwargs: Any) -> None:
        # An abbreviated key may mean another key in a later version, once a new key starts with it.
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program with the message or one line for each unknown key.

        After an error about a key, a last line names the command that lists all keys.

        Raises:
            ArgumentError: This is the parser of a class inside another parser, which reports the error.
            SystemExit: With code 2 and `ex` as its cause.
        """
        if not self.exit_on_error:
            raise ArgumentError(None, message) from ex
        parser = _failed_parser(self, ex)
        unknown = unknown_keys(parser, _words_of(parser, self.args)) if UNKNOWN_KEY.search(message) else []
        for line in [str(key) for key in unknown] or [" ".join(message.split())]:
            sys.stderr.write(f"error: {line}\n")
        if UNKNOWN_KEY.search(message) or MISSING_KEY in message:
            command = parser.prog.replace(" [options]", "")
            sys.stderr.write(f"All keys: {command} {HELP_ALL_OPTION if ' ' in command else HELP_OPTIONS[-1]}\n")
        raise SystemExit(2) from ex

    def instantiate(
        self, namespace: Namespace, instantiate_groups: bool = True, *, instantiators: Any = None
    ) -> Namespace:
        """Makes the objects of a config; the ConfigError of a class that refuses its settings names the class."""
        given = [*(instantiators or ()), (made, object, True)]
        return super().instantiate(namespace, instantiate_groups, instantiators=given)


def _failed_parser(parser: SuggestingParser, ex: Exception | None) -> SuggestingParser:
    """The parser of the subcommand if the error is about one of its arguments, else the given parser."""
    failed = ex.__dict__.get("subcommand_parser") if ex is not None else None
    return failed if isinstance(failed, SuggestingParser) else parser


def _words_of(parser: SuggestingParser, words: list[str]) -> list[str]:
    """The words after the subcommand."""
    return words[1:] if words and parser.prog.split()[-1] == words[0] else words
