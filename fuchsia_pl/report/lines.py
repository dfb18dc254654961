"""Reads files of JSON lines while another process may be appending to them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class LineReader:
    r"""Reads the lines that were added to a file since the last call, one at a time.

    An incomplete last line is left for the next call. A line that is no JSON object is passed over: a kill or a damaged disk
    may leave one, and all others can still be shown.

    Args:
        path: The file, which need not exist yet.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "a.jsonl")
    ...     _ = path.write_text('{"n": 1}\nno JSON\n{"n"')
    ...     reader = LineReader(path)
    ...     first = list(reader.new())
    ...     _ = path.write_text('{"n": 1}\nno JSON\n{"n": 2}\n')
    ...     first, list(reader.new())
    ([{'n': 1}], [{'n': 2}])
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0  # up to the end of the last complete line that was read

    def new(self) -> Iterator[dict[str, Any]]:
        """The objects of the lines that are complete by now. A file that cannot be read has none."""
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.num_bytes)
                for line in stream:
                    if not line.endswith(b"\n"):
                        return
                    self.num_bytes += len(line)
                    loaded = _object(line)
                    if loaded is not None:
                        yield loaded
        except OSError:
            return


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        loaded = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return loaded if isinstance(loaded, dict) else None
