"""Sampling: our rollouts against the same requests to vLLM's `AsyncLLM`, alternating on one engine."""

import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from fuchsia_pl.engines.base import VERSION_FILE, EngineSpec, SamplingParams
from fuchsia_pl.engines.vllm_colocated import VLLMColocatedEngine
from fuchsia_pl.engines.vllm_convert import to_vllm
from fuchsia_pl.envs import MultiTurnEnvironment, Rollout
from fuchsia_pl.library.arithmetic import Arithmetic
from fuchsia_pl.policy.config import PolicyConfig
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.rollouts.collector import Collector, Draw
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.types import ServedModel
from tests.bench.work import MODEL, model_folder, report

BOUND_S = 600.0
GROUP, NUM_ROUNDS, NUM_TURNS = 8, 5, 4


class Again(MultiTurnEnvironment):
    """Asks for the sum in four turns."""

    def __init__(self) -> None:
        super().__init__()
        self.max_steps = NUM_TURNS
        self.reward_functions = [answered]

    def train_items(self) -> list[dict[str, int]]:
        return Arithmetic().train_items()

    def messages(self, item: dict[str, int]) -> list[dict[str, str]]:
        return Arithmetic().messages(item)

    def step_rollout(self, rollout: Rollout) -> None:
        rollout.respond("Are you sure?")


def answered(rollouts: list[Rollout], *args: Any, **kwargs: Any) -> list[float]:
    return [float(rollout.num_sampled_tokens) for rollout in rollouts]


def requests_of(
    collector: Collector, draw: Draw, rollouts: Sequence[Rollout]
) -> list[list[tuple[list[int], SamplingParams]]]:
    """The prompt ids and sampling settings of each turn of some rollouts."""
    found = []
    for rollout in rollouts:
        turns, position, sampled = [], rollout.num_prompt_tokens, 0
        again = Rollout(rollout.item, rollout.item_index, rollout.sibling, rollout.temperature, rollout.prompt)
        for number, turn in enumerate(rollout.turns):
            room = min(collector.config.max_completion_tokens - sampled, collector.config.max_length - position)
            turns.append((rollout.token_ids[:position], collector._sampling(draw, again, (number,), room)))
            length = len(turn.completion.token_ids)
            position, sampled = position + length, sampled + length
            while position < len(rollout.loss_mask) and not rollout.loss_mask[position]:
                position += 1
        found.append(turns)
    return found


async def bare(llm: Any, requests: list[list[tuple[list[int], SamplingParams]]], address: str) -> int:
    """Samples the same turns with vLLM alone; returns the number of sampled tokens."""
    from vllm import TokensPrompt

    async def one(index: int, turns: list[tuple[list[int], SamplingParams]]) -> int:
        count = 0
        for number, (ids, sampling) in enumerate(turns):
            stream = llm.generate(TokensPrompt(prompt_token_ids=ids), to_vllm(sampling), f"{address}-{index}-{number}")
            async for output in stream:
                final = output.outputs[0]
            count += len(final.token_ids)
        return count

    return sum(await asyncio.gather(*(one(index, turns) for index, turns in enumerate(requests))))


async def timed(work: Callable[[], Awaitable[int]]) -> float:
    """Tokens per second of a function that returns its number of tokens."""
    start = time.perf_counter()
    return await work() / (time.perf_counter() - start)


async def compare(
    engine: VLLMColocatedEngine, environment: Any, sampling: SamplingConfig, num_prompts: int
) -> tuple[float, float]:
    """Median tokens per second of our rollouts and of the same requests to vLLM, measured alternately."""
    collector = Collector(engine, environment, Chat(str(model_folder())), sampling)
    ours, theirs = [], []
    thread = engine._thread
    assert thread is not None
    for round_number in range(NUM_ROUNDS + 1):  # the first is warm-up
        indices = list(range(round_number * num_prompts, (round_number + 1) * num_prompts))
        draw = Draw(environment.train_items(), indices, GROUP, 1.0, (0, "bench", round_number), step=0)
        rollouts: list[Rollout] = []

        async def cold() -> None:
            await thread.call(engine._llm.reset_prefix_cache(), BOUND_S)

        await cold()

        async def sample(draw: Draw = draw, rollouts: list[Rollout] = rollouts) -> int:
            rollouts += [rollout for group in await collector.collect(draw) for rollout in group]
            return sum(rollout.num_sampled_tokens for rollout in rollouts)

        ours.append(await timed(sample))
        requests = requests_of(collector, draw, rollouts)

        async def again(requests: Any = requests, number: int = round_number) -> int:
            return await thread.call(bare(engine._llm, requests, str(number)), BOUND_S)

        await cold()
        theirs.append(await timed(again))
    sys.stderr.write(f"{ours} {theirs}\n")
    return median(ours[1:]), median(theirs[1:])


def main() -> None:
    served = ServedModel(MODEL, "bfloat16", 16, lambda name: model_folder())
    engine = VLLMColocatedEngine(kv_cache_gb=1.0, enforce_eager=True)
    with tempfile.TemporaryDirectory() as root:
        engine.start(EngineSpec(served, 512, 0, Path(root) / "engine.log"))
        try:
            folder = Path(root) / "adapter"
            Policy(PolicyConfig(MODEL), model_folder(), with_reference=False).save_trained(folder)
            (folder / VERSION_FILE).write_text("0")
            asyncio.run(engine.load_weights(folder, 0))
            one = asyncio.run(compare(engine, Arithmetic(), SamplingConfig(GROUP, 1.0, 32, 128), 8))
            four = asyncio.run(compare(engine, Again(), SamplingConfig(GROUP, 1.0, 64, 512), 4))
        finally:
            engine.close()
    report(
        sampling_tokens_per_s=one[0],
        bare_tokens_per_s=one[1],
        turns_tokens_per_s=four[0],
        bare_turns_tokens_per_s=four[1],
    )


if __name__ == "__main__":
    main()
