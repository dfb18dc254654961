"""Audits tasks, several at the same time, and refuses those with faults."""

import json
import logging
import queue
import random
import shutil
import string
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from fuchsia_pl.envs.audit.findings import FindingKind
from fuchsia_pl.envs.audit.player import Audited, AuditSettings, TaskPlayer
from fuchsia_pl.envs.audit.task import AuditTask
from fuchsia_pl.envs.limited import LimitedWorkers
from fuchsia_pl.types import ConfigError

logger = logging.getLogger(__name__)
NUM_LETTERS = 16


def audit(
    tasks: Sequence[AuditTask], settings: AuditSettings, on_done: Callable[[Audited], None] | None = None
) -> list[Audited]:
    """Audits tasks in limited processes.

    The items and the texts are the same in every audit; nothing depends on the seed of a run.

    Args:
        tasks: The tasks.
        settings: The limits.
        on_done: Called after each task, from several threads.

    Returns:
        The results, in the order of the tasks.
    """
    waiting: queue.SimpleQueue[tuple[int, AuditTask]] = queue.SimpleQueue()
    for numbered in enumerate(tasks):
        waiting.put(numbered)
    done: dict[int, Audited] = {}
    stopped = threading.Event()

    def work() -> None:
        with _Workers(settings) as workers:
            while not stopped.is_set():
                try:
                    number, task = waiting.get_nowait()
                except queue.Empty:
                    return
                done[number] = workers.player(task).run()
                if on_done is not None:
                    on_done(done[number])

    num_threads = max(1, min(settings.num_threads, len(tasks)))
    with ThreadPoolExecutor(num_threads, thread_name_prefix="audit") as threads:
        try:
            for future in [threads.submit(work) for _ in range(num_threads)]:
                future.result()
        finally:
            stopped.set()
    return [done[number] for number in range(len(tasks))]


def refuse_unsound(
    where: str,
    tasks: Sequence[AuditTask],
    allow_unsound: bool,
    settings: AuditSettings,
    tolerated: Collection[FindingKind] = (),
) -> None:
    """Audits tasks, and refuses to train on those with faults.

    Args:
        where: The environment, for the message.
        tasks: The tasks of the run.
        allow_unsound: Whether tasks with faults are taken, with a warning.
        settings: The limits.
        tolerated: Faults that do no harm in this environment.

    Raises:
        ConfigError: A task has a fault, and `allow_unsound` is False.
    """
    results = audit(tasks, settings)
    found = [finding for one in results for finding in one.findings if finding.kind not in tolerated]
    for one in results:
        if one.unchecked:
            logger.warning("%s: the audit did not check: %s", where, "; ".join(one.unchecked))
    if not found:
        return
    faults = "; ".join(map(str, found))
    if not allow_unsound:
        names = sorted({finding.task for finding in found})
        raise ConfigError(
            f"{where}: the audit of the rewards found faults in {', '.join(names)}: {faults}. Leave these tasks out, or set "
            "data.environment.init_args.allow_unsound: true (`fuchsia check-env` shows the findings)"
        )
    logger.warning("%s trains on tasks with unsound rewards (allow_unsound): %s", where, faults)


class _Workers:
    """The processes of one thread: two servers for each function, started when a task first needs them."""

    def __init__(self, settings: AuditSettings) -> None:
        self._settings = settings
        self._stack = ExitStack()
        self._started: dict[tuple[str, str], tuple[LimitedWorkers, LimitedWorkers]] = {}

    def __enter__(self) -> "_Workers":
        self._folder = self._stack.enter_context(_lettered_folder())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def player(self, task: AuditTask) -> TaskPlayer:
        """A player for a task."""
        key = task.function, json.dumps(task.opening)
        if key not in self._started:
            self._started[key] = self._start(task, seed=0), self._start(task, seed=1)
        return TaskPlayer(task, *self._started[key], self._folder, self._settings)

    def _start(self, task: AuditTask, seed: int) -> LimitedWorkers:
        workers = LimitedWorkers(task.function, memory_mb=self._settings.memory_mb, seed=seed, opening=task.opening)
        return self._stack.enter_context(closing(workers))


@contextmanager
def _lettered_folder() -> Iterator[Path]:
    """An empty temporary folder whose name has letters and "_" alone."""
    letters = "".join(random.SystemRandom().choices(string.ascii_lowercase, k=NUM_LETTERS))
    folder = Path(tempfile.gettempdir()) / f"fuchsia_audit_{letters}"
    folder.mkdir(mode=0o700)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder
