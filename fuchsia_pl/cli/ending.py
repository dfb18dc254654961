"""With which code and words the command ends where its run did not come to its own end."""

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
    """Ends a process that was told to end, and prints how to go on.

    Args:
        words: The command, for the line that goes on.
        end: What ended the run; None where it came to its end all the same.
    """
    assert stopping.signum is not None
    lines = last_words(words, end) if is_first_rank() else error_words(end)
    if lines:
        stopping.write_line("\n".join(lines))
    # Lightning kills the first rank, which may be saving, when a rank that it started ends with anything but 0.
    sys.exit(0 if is_launched() else 128 + stopping.signum)


def last_words(words: list[str], end: BaseException | None) -> list[str]:
    """The lines that say where the run stands and how to go on."""
    assert stopping.signum is not None
    name = signal.Signals(stopping.signum).name
    lines = error_words(end)
    if end is None:
        return [*lines, f"{name} came at the end of the run, which is complete"]
    if stopping.checkpoint is None:
        return [*lines, f"stopped by {name} before there was anything to go on from: the same command starts anew"]
    return [
        *lines,
        f"stopped by {name}; {stopping.checkpoint} holds the run after step {stopping.step}",
        f"go on with: {resume_command(sys.argv[0], words, stopping.checkpoint)}",
    ]


def error_words(end: BaseException | None) -> list[str]:
    """The line about what ended the run in place of the signal, none where that did. Any rank may meet such an error alone.

    >>> error_words(Stopped(15)), error_words(OSError("no space"))
    ([], ['error on the way out: OSError: no space'])
    """
    return [] if isinstance(end, Stopped | None) else [f"error on the way out: {type(end).__name__}: {one_line(end)}"]


def resume_command(program: str, words: list[str], checkpoint: Path) -> str:
    """The command that goes on from a checkpoint.

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
