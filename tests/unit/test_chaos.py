"""Ten kills at random moments; `make chaos` runs a hundred."""

import re


def test_ten_kills_change_nothing(forkserver):
    """Runs in a separate process, which forks the runs and has no threads."""
    done = forkserver.run("-m", "tests.chaos", "10", "0", timeout_s=1200)
    assert done.returncode == 0, done.printed[-3000:]
    counts = {what: int(number) for number, what in re.findall(r"^ *(\d+)  (.+)$", done.printed, flags=re.MULTILINE)}
    assert counts["kills"] == 10
    assert any("to the trainer" in what for what in counts)
