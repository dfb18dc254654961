"""Exit code and last lines of a command that a signal or an error stopped."""

import shlex
import signal
import sys
from pathlib import Path
from typing import NoReturn

from fuchsia_pl.cli.failures import one_line
from fuchsia_pl.cli.launch import is_first_rank, is_launched
from fuchsia_pl.stopping import Stopped, stopping

CHECKPOINT_OPTION = "--ckpt_path"


def leave_stopped(words: list[str], end: BaseException | None) -> NoReturn:
    """Ends a process that a signal stopped, and prints the command that resumes the run.

    Args:
        words: The command line.
        end: The exception that ended the run; None if the run is complete all the same.
    """
    assert stopping.signum is not None
    lines = last_words(words, end) if is_first_rank() else error_words(end)
    if lines:
        stopping.write_line("\n".join(lines))
    # If a rank that Lightning started ends with a code other than 0, Lightning kills the first rank, which may be saving.
    sys.exit(0 if is_launched() else 128 + stopping.signum)


def last_words(words: list[str], end: BaseException | None) -> list[str]:
    """The last lines: the step of the run, and the command that resumes it."""
    assert stopping.signum is not None
    name = signal.Signals(stopping.signum).name
    lines = error_words(end)
    if end is None:
        return [*lines, f"{name} arrived at the end of the run, which is complete"]
    if stopping.continued is not None:
        return [*lines, f"stopped by {name}", *resume_lines(words)]
    if stopping.checkpoint is None:
        return [
            *lines,
            f"stopped by {name} before there was a checkpoint to continue from: the same command starts a new run",
        ]
    state, command = resume_lines(words)
    return [*lines, f"stopped by {name}; {state}", command]


def resume_lines(words: list[str]) -> list[str]:
    """What a run that ended early has left, and the command that continues it; [] if nothing can be continued.

    Args:
        words: The command line.
    """
    if stopping.continued is not None:
        return [f"{stopping.continued} contains the answers so far: the same command continues it"]
    if stopping.checkpoint is None:
        return []
    return [
        f"{stopping.checkpoint} contains the run after step {stopping.step}",
        f"continue with: {resume_command(sys.argv[0], words, stopping.checkpoint)}",
    ]


def error_words(end: BaseException | None) -> list[str]:
    """The line about an error that ended the run before the signal did, if there was one. It may be the error of any rank.

    >>> error_words(Stopped(15)), error_words(OSError("no space"))
    ([], ['error while the run ended: OSError: no space'])
    """
    return (
        [] if isinstance(end, Stopped | None) else [f"error while the run ended: {type(end).__name__}: {one_line(end)}"]
    )


def resume_command(program: str, words: list[str], checkpoint: Path) -> str:
    """The command that resumes from a checkpoint.

    >>> resume_command("/bin/fuchsia", ["fit", "--config", "a b.yaml", "--ckpt_path", "last"], Path("runs/a/1/last.ckpt"))
    "fuchsia fit --config 'a b.yaml' --ckpt_path runs/a/1/last.ckpt"
    >>> resume_command("fuchsia_pl/__main__.py", ["fit", "--ckpt_path=x"], Path("y"))
    'python -m fuchsia_pl fit --ckpt_path y'
    """
    kept: list[str] = []
    for position, word in enumerate(words):
        is_value = position > 0 and words[position - 1] == CHECKPOINT_OPTION
        if not is_value and word.partition("=")[0] != CHECKPOINT_OPTION:
            kept.append(word)
    command = ["python", "-m", "fuchsia_pl"] if program.endswith("__main__.py") else [Path(program).name]
    return shlex.join([*command, *kept, CHECKPOINT_OPTION, str(checkpoint)])
