"""Short forms of values for a terminal."""

from datetime import datetime


def plain(text: str) -> str:
    r"""A text without characters that control a terminal or reverse its direction: each becomes its escape.

    >>> plain("a\x1b[2J\u202eb\nä")
    'a\\x1b[2J\\u202eb\\nä'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def duration(seconds: float | None) -> str:
    """A duration in at most six characters.

    >>> [duration(s) for s in (None, 4.2, 59.7, 61, 3599, 3600, 40 * 3600, 86400 * 12)]
    ['', '4 s', '1 min', '1 min', '60 min', '1.0 h', '40.0 h', '12.0 d']
    """
    if seconds is None:
        return ""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} d"


def size(num_bytes: float) -> str:
    """A number of bytes in at most six characters.

    >>> [size(n) for n in (0, 999, 12_345, 999_999, 3_100_000, 269_000_000, 12_000_000_000)]
    ['0 B', '999 B', '12 KB', '1.0 MB', '3.1 MB', '269 MB', '12 GB']
    """
    for unit in ("B", "KB", "MB", "GB", "TB"):
        digits = 0 if unit == "B" or num_bytes >= 9.95 else 1
        if num_bytes < 999.5 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.{digits}f} {unit}"


def count(number: int) -> str:
    """A number of weights.

    >>> count(999), count(4_096), count(134_515_008), count(7_615_616_512)
    ('999', '4.1 thousand', '134.5 million', '7.6 billion')
    """
    for unit, name in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return str(number)


def local_time(time: datetime | None, with_year: bool) -> str:
    """A time in the time zone of the machine.

    >>> local_time(None, with_year=True)
    ''
    """
    return "" if time is None else time.astimezone().strftime("%Y-%m-%d %H:%M" if with_year else "%m-%d %H:%M")


def figure(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """A figure with its interval, if it has one.

    >>> figure(0.656), figure(0.656, 0.58, 0.7349), figure(None), figure(1234.5)
    ('0.656', '0.656 (0.580 to 0.735)', '', '1234')
    """
    if value is None:
        return ""
    interval = "" if low is None or high is None else f" ({_short(low)} to {_short(high)})"
    return _short(value) + interval


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
