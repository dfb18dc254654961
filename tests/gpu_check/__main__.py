"""`make gpu-check`: checks of what this machine's device can do, printed as they go, then as one table.

    python -m tests.gpu_check [--out runs/gpu-check.md] [--only NAME …] [--list]

Every model is made from a config with random weights; nothing is downloaded. vLLM is optional. On a CPU sizes are scaled down.
Beside FILE.md are FILE.json (the same as data) and FILE.log (what the libraries printed). The exit code is 1 if a check failed.
"""

import argparse
import signal
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

from fuchsia_pl import orphans
from tests.gpu_check.checks import CHECKS, Check
from tests.gpu_check.runner import run_checks, start_context
from tests.gpu_check.table import Run


def parsed(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check.md"), help="Markdown file of the table")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these checks; --list has the names")
    parser.add_argument("--list", action="store_true", help="print the checks and end")
    return parser.parse_args(words)


def chosen(names: list[str] | None) -> list[Check]:
    """The checks of these names behind that of the environment, or all. Slow ones run on a CPU only if they are named."""
    if names is None:
        return list(CHECKS)
    unknown = sorted(set(names) - {check.name for check in CHECKS})
    if unknown:
        raise SystemExit(
            f"--only {' '.join(unknown)}: there is no such check. There are {', '.join(c.name for c in CHECKS)}"
        )
    wanted = {CHECKS[0].name, *names}
    return [replace(check, is_named=True) for check in CHECKS if check.name in wanted]


def report(line: str) -> None:
    """Prints a line of progress at once."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def main(words: list[str]) -> int:
    """Runs the checks and returns the exit code."""
    options = parsed(words)
    if options.list:
        sys.stdout.write("".join(f"{check.name:16} {check.title}\n" for check in CHECKS))
        return 0
    checks, start = chosen(options.only), time.monotonic()
    log = options.out.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the check in progress, as Ctrl-C does
    orphans.watch()  # ends it also if this process is killed
    outcomes = run_checks(checks, start_context(checks), log, report)
    run = Run(outcomes, date.today().isoformat(), time.monotonic() - start)
    run.write(options.out)
    sys.stdout.write(run.markdown())
    report(f"written: {options.out}, {options.out.with_suffix('.json')}, {log}")
    return 1 if run.counts["fail"] or len(outcomes) < len(checks) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
