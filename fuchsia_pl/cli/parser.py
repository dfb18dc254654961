"""An argument parser whose errors are short and name the keys that were probably meant."""

import re
import sys
from argparse import ArgumentError
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from fuchsia_pl.cli.commands import HELP_ALL_OPTION, HELP_OPTIONS
from fuchsia_pl.cli.failures import made
from fuchsia_pl.cli.unknown_keys import unknown_keys

# jsonargparse's ways to report an unknown key: on the command line, in a config, and inside a class in either.
UNKNOWN_KEY = re.compile(
    r"unrecognized arguments: |does not accept option '|Option '[^']+' is not accepted|No action for key"
)


class SuggestingParser(LightningArgumentParser):
    """LightningArgumentParser without abbreviations, that reports all unknown keys at once."""

    def __init__(self, **kwargs: Any) -> None:
        # An abbreviated key would be accepted today and mean another once a new key starts with it.
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program with the message or the unknown keys, a line each, and where all keys are listed.

        Raises:
            ArgumentError: This is the parser of a class inside another parser, which goes on to report it.
            SystemExit: With code 2 and `ex` as its cause.
        """
        if not self.exit_on_error:
            raise ArgumentError(None, message) from ex
        parser = _failed_parser(self, ex)
        unknown = unknown_keys(parser, _words_of(parser, self.args)) if UNKNOWN_KEY.search(message) else []
        for line in [str(key) for key in unknown] or [" ".join(message.split())]:
            sys.stderr.write(f"error: {line}\n")
        command = parser.prog.replace(" [options]", "")
        sys.stderr.write(f"All keys: {command} {HELP_ALL_OPTION if ' ' in command else HELP_OPTIONS[-1]}\n")
        raise SystemExit(2) from ex

    def instantiate(
        self, namespace: Namespace, instantiate_groups: bool = True, *, instantiators: Any = None
    ) -> Namespace:
        """Makes the objects of a config; a class that refuses its settings is named in the ConfigError."""
        given = [*(instantiators or ()), (made, object, True)]
        return super().instantiate(namespace, instantiate_groups, instantiators=given)


def _failed_parser(parser: SuggestingParser, ex: Exception | None) -> SuggestingParser:
    """The subcommand's parser, where the error is one of its arguments'."""
    failed = ex.__dict__.get("subcommand_parser") if ex is not None else None
    return failed if isinstance(failed, SuggestingParser) else parser


def _words_of(parser: SuggestingParser, words: list[str]) -> list[str]:
    """The words after the subcommand."""
    return words[1:] if words and parser.prog.split()[-1] == words[0] else words
