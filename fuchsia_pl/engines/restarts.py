"""Restarts of an engine whose processes have ended, with the weights that it loaded last."""

import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from fuchsia_pl.engines.base import EngineLostError, EngineSpec
from fuchsia_pl.stopping import stopping

CLOSE_TIMEOUT_S = 60.0
NO_START = 0  # number of no start: a request that fails with it waits for the restart in progress

logger = logging.getLogger(__name__)


class Restarts:
    """Counts the starts of an engine, and keeps the weights that the next start has to load.

    Args:
        start: Starts the engine.
        load: Loads a folder as a version; raises `EngineLostError` if the engine ends meanwhile.
        end: Ends the remaining parts of the engine.
        abort: Makes a start that is in progress fail soon.
    """

    def __init__(
        self,
        start: Callable[[EngineSpec], None],
        load: Callable[[Path, int], None],
        end: Callable[[], None],
        abort: Callable[[], None],
    ) -> None:
        self._start, self._load, self._end, self._abort = start, load, end, abort
        self._lock = threading.Lock()
        self._spec: EngineSpec | None = None  # None before the start and after the end
        self._kept: tuple[Path, int] | None = None
        self.num_starts = 0
        # While a restart is in progress, a request would get other weights or no answer.
        self.is_busy = False

    def start(self, spec: EngineSpec) -> None:
        """The first start of a run."""
        self._spec, self._kept, self.num_starts = spec, None, 1
        self._start(spec)

    def close(self) -> None:
        """Ends the engine, also one that is being restarted."""
        self._spec = None
        if self.is_busy:
            self._abort()
        has_lock = self._lock.acquire(timeout=CLOSE_TIMEOUT_S)
        try:
            self._end()
        finally:
            if has_lock:
                self._lock.release()

    def loaded(self, folder: Path, version: int) -> None:
        """Keeps a copy of a folder beside it, as hard links if the file system has them.

        Args:
            folder: The loaded folder. Its owner removes it, and its parent at the end of the run.
            version: Version of its weights.
        """
        with self._lock:
            if self._spec is None or self.num_starts > self._spec.max_restarts:
                return
            kept = folder.with_name(f".kept.rank{self._spec.rank}")
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(folder, kept, copy_function=_link)
            self._kept = kept, version

    def restart(self, lost: EngineLostError) -> None:
        """Starts the engine again, unless another failed request has done so or the run is ending.

        Raises:
            EngineLostError: All restarts are used, or the run is ending.
            EngineError: The start failed.
        """
        with self._lock:
            if self._spec is None or lost.start_number != self.num_starts:
                return
            self.is_busy = True
            try:
                while self._spec is not None and not self._started_again(self._spec, lost):
                    pass  # the engine ended during the load; this counts as a start
            finally:
                self.is_busy = False
                if self._spec is None:
                    self._end()

    def _started_again(self, spec: EngineSpec, lost: EngineLostError) -> bool:
        """Starts the engine once. Returns whether it has the newest weights."""
        if self.num_starts > spec.max_restarts or stopping.signum is not None:
            raise lost
        logger.warning(
            "the engine has ended: restart %d of %d, then its requests are sampled again. %s",
            self.num_starts,
            spec.max_restarts,
            str(lost).splitlines()[0],
        )
        self._end()
        self.num_starts += 1
        self._start(spec)
        try:
            if self._kept is not None:
                self._load(*self._kept)
        except EngineLostError:
            return False
        return True


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no hard links
        shutil.copy2(source, target)
