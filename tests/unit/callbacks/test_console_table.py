"""The table of the console: rows within its width, numbers that fit and are not wrong."""

import math
from datetime import timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuchsia_pl.callbacks.console_table import CELL_WIDTH, COLUMNS, clock, header_row, number, shown_columns, step_row

VALUES = st.floats(allow_nan=True, allow_infinity=True) | st.floats(-1e5, 1e5) | st.floats(-1e-3, 1e-3)
METRICS = st.dictionaries(st.sampled_from([column.metric for column in COLUMNS]), VALUES)


@given(METRICS, METRICS, st.integers(0, 99_999), st.none() | VALUES, st.integers(0, 200))
def test_every_row_is_as_long_as_its_header_and_fits(first, metrics, step, left, width):
    columns = shown_columns(first, width)
    header, row = header_row(columns), step_row(step, columns, metrics, left)
    assert len(header) == len(row) <= max(width, 60)
    assert "\n" not in row
    titles, cells = header.split(), row.split()
    assert titles[0] == "step"
    assert cells[0] == str(step)
    # Each cell ends in the column in which its title ends, and a gap of two separates it from the one before.
    ends = [5 + 10 * n for n in range(len(columns) + 1)]
    assert all(row[end - 1] != " " for end in ends)
    assert all(row[end - 10 : end - 8] == "  " for end in ends[1:])


@pytest.mark.parametrize(
    ("width", "labels"),
    [
        (40, ["reward", "accuracy", "kl", "length", "left"]),
        (60, ["reward", "accuracy", "kl", "length", "left"]),
        (79, ["reward", "accuracy", "kl", "length", "gap", "s/step", "left"]),
        (80, ["reward", "accuracy", "kl", "length", "gap", "s/step", "left"]),
        (95, ["reward", "accuracy", "kl", "length", "gap", "s/step", "left", "entropy", "cut off"]),
    ],
)
def test_a_wider_console_has_more_columns(width, labels):
    assert [column.label for column in shown_columns({column.metric: 0.0 for column in COLUMNS}, width)] == labels


@given(VALUES, st.integers(0, 4))
def test_a_number_fits_and_is_within_a_unit_of_its_last_digit(value, decimals):
    text = number(value, decimals)
    assert len(text) <= CELL_WIDTH
    if not math.isfinite(value):
        assert text == str(value)
        return
    shown = Decimal(text)  # "1.8e+308" is no float
    mantissa, _, exponent = text.partition("e")
    places = len(mantissa.partition(".")[2])
    unit = Decimal(10) ** (int(exponent or 0) - places)
    assert abs(shown - Decimal(value)) <= Decimal("0.51") * unit
    assert (shown == 0) == (value == 0)


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (0.1126, 3, "0.113"),
        (-0.6561, 4, "-0.6561"),
        (24.06, 1, "24.1"),
        (99999.99, 3, "99999.99"),
        (123456789.0, 1, "1.2e+08"),
        (0.00004, 3, "4.0e-05"),
        (-4e-300, 3, "-4e-300"),
        (0.0, 4, "0.0000"),
    ],
)
def test_numbers_by_hand(value, decimals, text):
    assert number(value, decimals) == text


@given(st.integers(0, 99 * 3600))
def test_a_duration_is_hours_minutes_and_seconds(seconds):
    expected = str(timedelta(seconds=seconds % 86400))  # "1:02:03"
    if seconds < 3600:
        expected = expected.removeprefix("0:").removeprefix("0")
        expected = expected if not expected.startswith(":") else f"0{expected}"
    elif seconds >= 86400:
        expected = f"{seconds // 3600}:{expected.split(':', 1)[1]}"
    assert clock(float(seconds)) == expected
    assert len(clock(float(seconds))) <= CELL_WIDTH


@given(VALUES)
def test_any_duration_fits(seconds):
    assert 0 < len(clock(seconds)) <= CELL_WIDTH
