"""Runs the audit of rewards for `fuchsia check-env`, and prints its findings."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fuchsia_pl.cli.terminal import plain
from fuchsia_pl.envs.audit.player import Audited, AuditSettings
from fuchsia_pl.envs.audit.runner import audit
from fuchsia_pl.envs.audit.task import AuditTask


def run_audit(console: Console, tasks: Sequence[AuditTask], settings: AuditSettings) -> list[Audited]:
    """Audits tasks. A terminal shows how many are done."""
    done: list[Audited] = []
    with console.status(f"auditing {len(tasks)} tasks") as status:

        def show(audited: Audited) -> None:
            done.append(audited)
            status.update(Text(plain(f"audited {len(done)} of {len(tasks)} tasks, last {audited.task}")))

        return audit(tasks, settings, on_done=show)


def report_audit(console: Console, audited: Sequence[Audited]) -> None:
    """Prints a table with a row for each finding, what was not checked, and the tasks without findings."""
    if any(one.findings for one in audited):
        console.print(findings_table(audited))
    for sentence in (sentence for one in audited for sentence in one.unchecked):
        console.print(Text(plain(f"not checked: {sentence}")), soft_wrap=True)
    sound = [one.task for one in audited if not one.findings]
    number = sum(len(one.findings) for one in audited)
    console.print(Text(plain(f"without findings: {', '.join(sound) or 'none'}")), soft_wrap=True)
    texts = sum(one.num_played for one in audited)
    findings = "1 finding" if number == 1 else f"{number} findings"
    console.print(f"audit: {findings} in {len(audited) - len(sound)} of {len(audited)} tasks, {texts} answers scored")


def findings_table(audited: Sequence[Audited]) -> Table:
    """A row for each finding. Texts of rewards are printed without control characters."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("task", "finding", "text", "evidence"):
        table.add_column(column, no_wrap=column == "task")
    for one in audited:
        for number, found in enumerate(one.findings):
            cells = (one.task if number == 0 else "", found.kind, found.probe, found.evidence)
            table.add_row(*(Text(plain(cell)) for cell in cells))
    return table
