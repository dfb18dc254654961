"""Agents: 64 of them with an OpenAI client, against the same requests to vLLM's `AsyncLLM`, alternating on one engine."""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from fuchsia_pl.engines.base import VERSION_FILE, EngineSpec
from fuchsia_pl.engines.vllm_colocated import VLLMColocatedEngine
from fuchsia_pl.gateway import AgentEnvironment
from fuchsia_pl.library.arithmetic import Arithmetic
from fuchsia_pl.policy.config import PolicyConfig
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.types import ServedModel
from tests.bench.sampling import GROUP, NUM_TURNS, answered, compare
from tests.bench.work import MODEL, model_folder, report

NUM_AGENTS = 64


async def ask(item: dict[str, Any], base_url: str, api_key: str) -> None:
    """The sum in four turns, as `tests.bench.sampling` asks for it."""
    from openai import AsyncOpenAI

    messages: list[Any] = Arithmetic().messages(item)
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        for _ in range(NUM_TURNS):
            answer = await client.chat.completions.create(model="policy", messages=messages)
            messages += [answer.choices[0].message, {"role": "user", "content": "Are you sure?"}]


class Agents(AgentEnvironment):
    """The items of the quickstart, solved by agents."""

    def __init__(self) -> None:
        super().__init__("tests.bench.gateway:ask")
        self.reward_functions = [answered]

    def train_items(self) -> list[dict[str, int]]:
        return Arithmetic().train_items()

    def messages(self, item: Any) -> list[dict[str, str]]:
        return Arithmetic().messages(item)


async def measured(engine: VLLMColocatedEngine, sampling: SamplingConfig) -> tuple[float, float]:
    """Tokens per second of the agents, and of the engine alone."""
    environment = Agents()
    try:
        return await compare(engine, environment, sampling, NUM_AGENTS // GROUP)
    finally:
        await environment.close()


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
            ours, bare = asyncio.run(measured(engine, SamplingConfig(GROUP, 1.0, 64, 512)))
        finally:
            engine.close()
    report(agents_tokens_per_s=ours, bare_agents_tokens_per_s=bare)


if __name__ == "__main__":
    main()
