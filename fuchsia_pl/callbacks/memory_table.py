"""The memory plan as a table, for the console of a run and for `fuchsia plan`."""

from rich.table import Table
from rich.text import Text

from fuchsia_pl.policy.plan import GIB, SIDES, MemoryPlan


def memory_table(plan: MemoryPlan) -> Table:
    """A row for each part of the plan, and its peak."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for side in SIDES:
        parts = [part for part in plan.parts if part.side == side]
        if parts:
            table.add_row(Text(side, style="bold"), Text(size(sum(part.num_bytes for part in parts))))
        for part in parts:
            table.add_row(Text(f"  {part.name}"), Text(size(part.num_bytes)))
    table.add_row(Text("peak", style="bold"), Text(size(plan.total)), Text(remark(plan)))
    return table


def size(num_bytes: float) -> str:
    """Bytes in GiB, or in MiB below one GiB.

    >>> size(3.5 * GIB), size(GIB / 64)
    ('3.5 GiB', '16 MiB')
    """
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.0f} MiB"


def remark(plan: MemoryPlan) -> str:
    """Whether the plan fits, and how it was added up.

    >>> remark(MemoryPlan((), 4 * GIB))
    'fits: 4.0 of 4.0 GiB stay free'
    """
    available, left = plan.available / GIB, (plan.available - plan.total) / GIB
    fits = (
        f"fits: {left:.1f} of {available:.1f} GiB stay free" if plan.fits else f"does not fit into {available:.1f} GiB"
    )
    return f"one side at a time; {fits}" if plan.shares_device else fits
