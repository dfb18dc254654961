"""Runs each check in a process of its own, in bounded time: neither a crash nor a full device ends the others."""

import contextlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from tests.gpu_check.checks import Check
from tests.gpu_check.findings import Findings, Message, NotHereError, Outcome

# A driver of NVIDIA, AMD, or Windows under WSL.
DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
END_S, LOOK_S = 5.0, 0.5
Report = Callable[[str], None]


def start_context(checks: Sequence[Check]) -> BaseContext:
    """How processes start: by a fork of one that has imported everything, or anew where there is a GPU driver.

    A fork is faster, but a library that touches CUDA while it is imported would make the device unusable in all forks.
    """
    if any(Path(driver).exists() for driver in DRIVERS):
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(sorted({check.module for check in checks}))
    return context


def run_checks(checks: Sequence[Check], context: BaseContext, log: Path, report: Report) -> list[Outcome]:
    """Runs checks one after the other; an interrupt ends the present one and leaves the rest out.

    Args:
        checks: The checks, in order.
        context: How their processes start.
        log: File for all that the checks and their libraries print.
        report: Is called with each line of progress.
    """
    outcomes = []
    for number, check in enumerate(checks, start=1):
        report(f"[{number}/{len(checks)}] {check.name}: {check.title}")
        try:
            outcome = run_check(check, context, log, report)
        except KeyboardInterrupt:
            report("interrupted; the remaining checks are left out")
            break
        verdict = f"not here: {outcome.reason}" if outcome.is_skipped else outcome.result
        report(f"    -> {verdict} ({outcome.seconds:.1f} s)")
        outcomes.append(outcome)
    return outcomes


def run_check(check: Check, context: BaseContext, log: Path, report: Report) -> Outcome:
    """Runs one check and ends its process with all descendants."""
    outcome, start = Outcome(check.name, check.title), time.monotonic()
    receiver, sender = context.Pipe(duplex=False)
    # A check that is killed cannot remove its models, so its folder for temporary files is made and removed here.
    with TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as scratch:
        process = context.Process(target=_run, args=(check, str(log), scratch, sender))  # type: ignore[attr-defined]
        process.start()
        sender.close()
        try:
            for message in _messages(process, receiver, check.limit_s):
                figure = outcome.take(message)
                if figure is not None:
                    report(f"    {'' if figure.holds else 'FAILED '}{figure.text}")
        finally:
            _end(process.pid)
            process.join(END_S)
            receiver.close()
    outcome.seconds = time.monotonic() - start
    return outcome


def _messages(process: BaseProcess, receiver: Connection, limit_s: float) -> Iterator[Message]:
    """The messages of a check, and one more if the last of them does not come."""
    deadline = time.monotonic() + limit_s
    while (left := deadline - time.monotonic()) > 0:
        if not receiver.poll(min(left, LOOK_S)):
            if process.is_alive():
                continue
            break  # killed, and a process that it left holds the pipe open
        try:
            message = receiver.recv()
        except EOFError:
            break
        if message.kind == "end":
            process.join(END_S)  # its libraries free what belongs to the system
            return
        yield message
    else:
        yield Message("crash", f"took longer than {limit_s:g} s")
        return
    process.join(END_S)
    yield Message("crash", f"its process ended with code {process.exitcode}")


def _end(pid: int) -> None:
    """Kills a process, its descendants, engines among them, and what it left in its session."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _run(check: Check, log: str, scratch: str, sender: Connection) -> None:
    """The process of a check. What it and its libraries print goes into the log."""
    os.setsid()
    os.environ["TMPDIR"] = tempfile.tempdir = scratch
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "a", buffering=1)
    sys.stderr.write(f"\n===== {check.name} =====\n")
    try:
        findings = Findings(sender.send, check.is_named)
        getattr(import_module(check.module), check.function)(findings, *check.arguments)
    except NotHereError as reason:
        sender.send(Message("not here", str(reason)))
    except BaseException as error:  # also SystemExit and a broken import: each is the outcome of this check
        traceback.print_exc()
        sender.send(Message("crash", crash_text(error)))
    sys.stderr.flush()
    sender.send(Message("end", None))


def crash_text(error: BaseException) -> str:
    """An error in one line; running out of memory is named first.

    >>> crash_text(ValueError("no such thing"))
    'ValueError: no such thing'
    >>> crash_text(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    'out of memory: CUDA out of memory. Tried to allocate 2 GiB'
    """
    line = next(iter(str(error).strip().splitlines()), "")
    kind = "out of memory" if any(words in line for words in OUT_OF_MEMORY) else type(error).__name__
    return f"{kind}: {line}"[:300]
