"""A conversation of verifiers against the same one as an environment of ours: milliseconds a turn on top.

    python -m tests.bench.verifiers

Both use the same scripted engine, whose turns take no time, and alternate.
"""

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from fuchsia_pl.envs.base import Environment
from fuchsia_pl.library.verifiers import VerifiersEnvironment
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.rollouts.collector import Collector, Draw
from fuchsia_pl.rollouts.config import SamplingConfig
from tests.bench.work import report
from tests.doubles import save_tiny_model
from tests.envs.test_verifiers import TASKSETS, Chatting, NativeSort

NUM_TASKS, GROUP, NUM_ROUNDS = 8, 8, 7


def seconds_per_turn(environment: Environment, chat: Chat, number: int) -> float:
    """Seconds of a draw of all tasks, over its turns."""
    collector = Collector(Chatting(), environment, chat, SamplingConfig(GROUP, 1.0, 200, 2000))
    draw = Draw(environment.train_items(), list(range(NUM_TASKS)), GROUP, 1.0, ("bench", number), step=0)
    start = time.perf_counter()
    groups = asyncio.run(collector.collect(draw))
    return (time.perf_counter() - start) / sum(len(rollout.turns) for group in groups for rollout in group)


def main() -> None:
    sys.path.insert(0, str(TASKSETS))
    with tempfile.TemporaryDirectory() as folder:
        chat = Chat(save_tiny_model(Path(folder)))
        ported, native = (
            VerifiersEnvironment("alphabet-sort", num_tasks=NUM_TASKS, num_validation=0),
            NativeSort(NUM_TASKS),
        )
        pairs = [[seconds_per_turn(one, chat, number) for one in (ported, native)] for number in range(NUM_ROUNDS)]
    ours, theirs = (median(column) for column in zip(*pairs[1:], strict=True))
    sys.stderr.write(f"{1000 * ours:.2f} ms a turn with verifiers, {1000 * theirs:.2f} ms as a native port\n")
    report(verifiers_ms_a_turn=1000 * (ours - theirs))


if __name__ == "__main__":
    main()
