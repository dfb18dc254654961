"""An engine whose processes end is started again, with the weights it loaded last."""

import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from fuchsia_pl.engines.base import EngineLostError, EngineSpec

logger = logging.getLogger(__name__)


class Restarts:
    """Counts the starts of an engine, and keeps what the next one has to load.

    Args:
        start: Starts the engine.
        load: Loads a folder as a version.
        end: Ends what is left of the engine.
    """

    def __init__(
        self, start: Callable[[EngineSpec], None], load: Callable[[Path, int], None], end: Callable[[], None]
    ) -> None:
        self._start, self._load, self._end = start, load, end
        self._lock = threading.Lock()
        self._spec: EngineSpec | None = None  # None before the start and after the end
        self._kept: tuple[Path, int] | None = None
        self.num_starts = 0

    def start(self, spec: EngineSpec) -> None:
        """The first start of a run."""
        self._spec, self._kept, self.num_starts = spec, None, 1
        self._start(spec)

    def close(self) -> None:
        """Ends the engine; one that is being restarted ends once it has come up."""
        self._spec = None
        self._end()

    def loaded(self, folder: Path, version: int) -> None:
        """Keeps the files of a folder under another name beside it, as hard links: no bytes are copied.

        Args:
            folder: What was loaded. Its owner removes it, and its parent at the end of the run.
            version: Of its weights.
        """
        if self._spec is None or self.num_starts > self._spec.max_restarts:
            return
        kept = folder.with_name(f".kept.rank{self._spec.rank}")
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        for file in folder.iterdir():
            os.link(file, kept / file.name)
        self._kept = kept, version

    def restart(self, lost: EngineLostError) -> None:
        """Starts the engine again, unless another request that failed has done so.

        Raises:
            EngineLostError: It was restarted as often as it may.
            EngineError: The start failed.
        """
        with self._lock:
            spec = self._spec
            if spec is None or lost.start_number != self.num_starts:
                return
            if self.num_starts > spec.max_restarts:
                raise lost
            logger.warning(
                "the engine has ended: restart %d of %d, and what was being sampled is sampled again. %s",
                self.num_starts,
                spec.max_restarts,
                str(lost).splitlines()[0],
            )
            self._end()
            self.num_starts += 1
            self._start(spec)
            if self._kept is not None:
                self._load(*self._kept)
            if self._spec is None:  # the run ended meanwhile
                self._end()
