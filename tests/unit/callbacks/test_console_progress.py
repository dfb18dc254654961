"""Work in progress on the console: one line of a terminal, plain lines elsewhere."""

import io
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fuchsia_pl.callbacks import console_progress
from fuchsia_pl.callbacks.console_progress import Pace, ProgressDisplay, RunConsole, progress_line, shown_progress
from fuchsia_pl.progress import HELD_OUT, SAMPLING, SYNC, TRAINING, Activity, progress
from tests.screen import screen_of

TERMINAL = {"force_terminal": True, "_environ": {"TERM": "xterm"}, "width": 80, "highlight": False}


@pytest.fixture
def terminal():
    return RunConsole(file=io.StringIO(), **TERMINAL)


@pytest.fixture
def plain():
    return RunConsole(file=io.StringIO(), width=80)


def lines_of(console: Console) -> list[str]:
    return screen_of(console.file.getvalue(), console.width)


def until(holds: Callable[[], bool]) -> None:
    """Waits for the thread that refreshes the display."""
    end = time.monotonic() + 20
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)
    assert holds()


def test_the_time_left_follows_the_latest_steps():
    pace = Pace(step=10, total=100, now=0.0)
    assert pace.left(now=5.0) is None
    pace.stepped(11, now=10.0)
    assert pace.left(now=10.0) == 89 * 10.0
    assert pace.left(now=13.0) == 89 * 10.0 - 3.0
    for step in range(12, 40):  # all of the latest 20 steps take one second
        pace.stepped(step, now=10.0 + step - 11)
    assert pace.left(now=38.0) == pytest.approx(61.0)
    assert pace.left(now=1e9) == 0.0
    assert Pace(0, None, 0.0).left(1.0) is None


def test_a_terminal_has_one_line_that_is_gone_at_the_end(terminal):
    with shown_progress(terminal):
        with progress.activity("rendering training prompts", 7, "prompts") as activity:
            activity.advance(3)
            until(lambda: "3/7" in terminal.file.getvalue())
            last = [line for line in lines_of(terminal) if line]
            assert len(last) == 1
            assert last[0].startswith("rendering training prompts 3/7 prompts ━")
            assert progress.line_start
        assert [line for line in lines_of(terminal) if line] == []
        assert progress.line_start == ""
    assert "\x1b[?25" not in terminal.file.getvalue(), "a killed process could not show the cursor again"
    assert progress.current == ()


def test_what_is_printed_meanwhile_stays_above_the_line(terminal, monkeypatch):
    """During training, other code prints to the same terminal."""
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", stream)
    display = ProgressDisplay(terminal)
    display.open()
    display.begin_training(Pace(0, 25, time.monotonic()))
    with progress.activity(SAMPLING, 64, "rollouts"):
        print("one of a user's functions")  # noqa: T201
        terminal.print("a row")
        time.sleep(0.6)  # a refresh between two prints
        print("another line")  # noqa: T201
        shown = [line for line in lines_of(terminal) if line]
    display.close()
    assert shown[:3] == ["one of a user's functions", "a row", "another line"]
    assert len(shown) == 4
    assert shown[3].startswith("step 1/25  sampling 0/64 rollouts ━")
    assert [line for line in lines_of(terminal) if line] == shown[:3]
    assert sys.stdout is stream
    assert stream.getvalue() == ""


def test_the_line_shows_what_the_run_waits_for(plain):
    display = ProgressDisplay(plain)
    with progress.activity(SAMPLING, 8, "rollouts"):
        assert display.shown.name == SAMPLING
        next_phase = progress.activity(SAMPLING, 8, "rollouts")
        with progress.activity(TRAINING, 2, "micro-batches"), next_phase:
            assert display.shown.name == TRAINING
        with progress.activity(HELD_OUT, 4, "rollouts"):
            assert display.shown.name == HELD_OUT
            with progress.activity(SYNC):
                assert display.shown.name == SYNC
        with progress.activity("starting VLLMColocatedEngine"):  # a restart
            assert display.shown.name == "starting VLLMColocatedEngine"
    assert display.shown is None


@given(
    st.integers(0, 10**7),
    st.none() | st.integers(0, 10**7),
    st.text("abcdefghij ", min_size=1, max_size=120),
    st.none() | st.integers(0, 10**9),
    st.integers(20, 130),
    st.booleans(),
)
def test_the_line_never_wraps(step, total, name, number, width, is_training):
    activity = Activity(name, number, "rollouts")
    activity.advance(number or 0)
    pace = Pace(step, total, 0.0)
    pace.stepped(step + 1, 5e5)
    console = RunConsole(file=io.StringIO(), width=max(width, 60))
    console.print(progress_line(pace if is_training else None, activity, width, now=5e5))
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 1
    assert len(lines[0].rstrip()) < max(width, 60)


def test_without_a_terminal_long_work_has_a_line_at_its_end(plain, monkeypatch):
    monkeypatch.setattr(console_progress, "LONG_S", 0.05)
    with shown_progress(plain):
        for name, seconds in {"converting a.gguf": 0.1, "loading the model": 0.0, SAMPLING: 0.1, TRAINING: 0.1}.items():
            with progress.activity(name):
                time.sleep(seconds)
        with suppress(LookupError), progress.activity("starting VLLMColocatedEngine"):
            time.sleep(0.1)
            raise LookupError
    assert plain.file.getvalue() == "converting a.gguf took 0:00\n"


def test_without_a_terminal_silence_is_broken_and_nothing_repeats_sooner(plain, monkeypatch):
    monkeypatch.setattr(console_progress, "SILENT_S", 0.4)
    monkeypatch.setattr(console_progress, "BEAT_S", 0.02)
    display = ProgressDisplay(plain)
    display.open()
    display.pace = Pace(3, 25, time.monotonic())
    start = time.monotonic()
    with progress.activity(SAMPLING, 64, "rollouts") as activity:
        activity.advance(5)
        until(lambda: plain.file.getvalue().count("\n") >= 2)
        display.close()
        lines, seconds = plain.file.getvalue().splitlines(), time.monotonic() - start
    assert 2 <= len(lines) <= seconds / 0.4
    assert {line[:-9] for line in lines} == {"step 4/25: sampling 5/64 rollouts, 0:"}
    time.sleep(0.6)
    assert len(plain.file.getvalue().splitlines()) <= len(lines) + 1


def test_an_open_display_of_a_quiet_console_writes_nothing(terminal):
    terminal.quiet = True
    with shown_progress(terminal), progress.activity("loading the model"):
        time.sleep(0.3)
    assert terminal.file.getvalue() == ""


def test_the_line_is_on_the_terminal_while_an_engine_has_the_descriptors(tmp_path, monkeypatch):
    """An engine's start sends descriptor 1 to a log."""
    with (tmp_path / "terminal").open("w") as stream, (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "__stdout__", stream)
        console = RunConsole(**TERMINAL)
        with shown_progress(console):
            saved = os.dup(stream.fileno())
            os.dup2(log.fileno(), stream.fileno())
            with progress.activity("starting VLLMColocatedEngine"):
                end = time.monotonic() + 30
                while not (tmp_path / "terminal").read_text() and time.monotonic() < end:
                    time.sleep(0.02)
            os.dup2(saved, stream.fileno())
            os.close(saved)
        assert console.file is stream
    assert "starting VLLMColocatedEngine" in (tmp_path / "terminal").read_text()
    assert (tmp_path / "log").read_text() == ""


def test_any_thread_may_count():
    activity = Activity("sampling", total=0)

    def count() -> None:
        for _ in range(2000):
            activity.expect(1)
            activity.advance()

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (activity.done, activity.total) == (16000, 16000)


def test_numbers_of_a_library_never_fall():
    activity = Activity("converting")
    activity.report(5, 9)
    activity.report(3, 9)
    assert (activity.done, activity.total) == (5, 9)
