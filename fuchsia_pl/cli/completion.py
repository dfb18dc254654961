"""Completion for bash: a script that contains all commands and settings, since a call of Python at each TAB takes too long."""

from fuchsia_pl.cli.commands import COMMANDS, DEBUG_OPTION, HELP_ALL_OPTION, HELP_OPTIONS, RUN_COMMANDS
from fuchsia_pl.cli.help_page import Table
from fuchsia_pl.cli.options import OPTIONS, RUN_OPTIONS

# `compopt` exists in bash 4 and later; the bash of macOS adds a space after a folder.
SCRIPT = """\
# bash completion of fuchsia; made by `fuchsia completion bash`.
_fuchsia() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}} words=""
    COMPREPLY=()
    # bash makes a word of its own of "=".
    if [[ $word == "=" ]]; then word=""; elif [[ $previous == "=" ]]; then previous=${{COMP_WORDS[COMP_CWORD-2]}}; fi
    if [[ $COMP_CWORD -eq 1 ]]; then
        COMPREPLY=($(compgen -W "{commands} --help --version" -- "$word"))
        return
    fi
    if [[ $previous == --config || $previous == -c ]]; then
        compopt -o filenames 2>/dev/null
        COMPREPLY=($(compgen -W "{configs}" -- "$word") $(compgen -f -- "$word"))
        return
    fi
    case $command in
{cases}
    esac
    if [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "$words {debug}" -- "$word"))
    elif [[ $previous == --*[._]file || $previous == --ckpt_path || $command == replay || $command == report ]]; then
        compopt -o filenames 2>/dev/null
        COMPREPLY=($(compgen -f -- "$word"))
    elif [[ $command == completion ]]; then
        COMPREPLY=($(compgen -W "bash" -- "$word"))
    fi
}}
complete -F _fuchsia fuchsia
"""


def bash_completion(table: Table) -> str:
    """The script.

    Args:
        table: The settings of the default classes.
    """
    cases = [f'        {name}) words="{" ".join(_options(name, table))}" ;;' for name in COMMANDS]
    return SCRIPT.format(
        commands=" ".join(COMMANDS), configs=" ".join(table.configs), cases="\n".join(cases), debug=DEBUG_OPTION
    )


def _options(command: str, table: Table) -> list[str]:
    """The options of a command; `check-env`, `serve`, `eval` and `predict` have those of `fit` and additional ones."""
    options = {**OPTIONS, **RUN_OPTIONS}
    own = (
        [word for action in options[command]()._actions for word in action.option_strings] if command in options else []
    )
    if command in ("chat", "export", "report", "replay", "runs", "completion"):
        return own
    settings = [s.key for group in table.groups for s in group.settings if s.command in ("", command)]
    helps = [*HELP_OPTIONS, HELP_ALL_OPTION] if command in RUN_COMMANDS else []
    return list(dict.fromkeys([*own, *helps, *(f"--{key}" for key in settings)]))
