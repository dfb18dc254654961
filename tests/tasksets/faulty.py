"""A taskset in the API of verifiers 0.4 whose tasks fail, each in another way, and one that does not."""

import asyncio

import verifiers.v1 as vf

__all__ = ["Faulty", "FaultyEnv"]
FAULTS = (
    "none",
    "reward raises",
    "reward exits",
    "reward is nan",
    "run raises",
    "run exits",
    "run hangs",
    "run gives up",
    "run ignores",
    "run opens anew",
    "reward is slow",
)


class FaultyData(vf.TaskData):
    fault: str


class FaultyTask(vf.Task[FaultyData]):
    @vf.reward
    async def scored(self, trace: vf.Trace) -> float:
        if self.data.fault == "reward raises":
            raise ZeroDivisionError("no score")
        if self.data.fault == "reward exits":
            raise SystemExit(0)
        if self.data.fault == "reward is slow":
            await asyncio.sleep(60)
        return float("nan") if self.data.fault == "reward is nan" else 1.0


class FaultyEnv(vf.SingleAgentEnv):
    openings = 0

    async def run(self, task: vf.Task, agents: vf.Agents) -> None:
        fault = task.data.fault
        FaultyEnv.openings += 1
        async with agents.agent.interaction(task) as interaction:
            await interaction.turn(f"go {FaultyEnv.openings}" if fault == "run opens anew" else "go")
            if fault == "run raises":
                raise RuntimeError("no more")
            if fault == "run exits":
                raise KeyboardInterrupt
            if fault == "run hangs":
                await asyncio.Event().wait()
            if fault == "run gives up":
                await asyncio.wait_for(interaction.turn("quick"), 0.05)
            if fault == "run ignores":
                try:
                    await interaction.turn("again")
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    await asyncio.sleep(0.1)
                    raise ValueError("cancelled") from None


class Faulty(vf.Taskset[FaultyTask, vf.TasksetConfig]):
    def load(self) -> list[FaultyTask]:
        return [
            FaultyTask(FaultyData(fault=fault, timeout=vf.TaskTimeout(scoring=0.3)), self.config.task)
            for fault in FAULTS
        ]
