"""An engine that samples in a separate process, which can be killed like vLLM's."""

import asyncio
import json
import subprocess
import sys
import threading
from pathlib import Path

from fuchsia_pl.engines.base import Engine, EngineLostError, EngineSpec, SamplingParams, check_version_file
from fuchsia_pl.engines.restarts import NO_START, Restarts
from fuchsia_pl.types import Completion
from tests.doubles import EOS

# Ids depend on the prompt, the seed and the version that was loaded last. The process ends when its input is closed.
SAMPLER = """
import json, random, sys
version = -1
for line in sys.stdin:
    order = json.loads(line)
    if "load" in order:
        version, reply = order["load"], {}
    else:
        numbers = random.Random(f"{order['prompt']} {order['seed']} {version}")
        reply = {"ids": [numbers.randrange(4, 40) for _ in range(numbers.randrange(1, order["most"]))], "version": version}
    print(json.dumps(reply), flush=True)
"""


class ProcessEngine(Engine):
    """Ends and restarts like `VLLMColocatedEngine`, in a hundredth of the time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._version = -1
        self._lock = threading.Lock()
        self._restarts = Restarts(self._launch, self._load, self._end, abort=lambda: None)

    @property
    def policy_version(self) -> int:
        return self._version

    def start(self, spec: EngineSpec) -> None:
        if self._process is None:
            self._restarts.start(spec)

    def close(self) -> None:
        self._restarts.close()

    async def generate(self, prompt_ids, sampling: SamplingParams) -> Completion:
        if self._restarts.is_busy:
            raise EngineLostError("it starts again", NO_START)
        order = {"prompt": list(prompt_ids), "seed": sampling.seed, "most": sampling.max_tokens}
        reply = await asyncio.to_thread(self._order, order)
        ids = (*reply["ids"], EOS)
        return Completion(ids, (-1.5,) * len(ids), "stop", None, reply["version"])

    async def score(self, token_ids) -> tuple[float, ...]:
        return (-1.5,) * (len(token_ids) - 1)

    async def load_weights(self, path: Path, version: int) -> None:
        while True:
            try:
                await asyncio.to_thread(self._load, path, version)
            except EngineLostError as lost:
                await self.restart(lost)
            else:
                self._restarts.loaded(path, version)
                return

    async def restart(self, lost: EngineLostError) -> None:
        await asyncio.to_thread(self._restarts.restart, lost)

    def _load(self, path: Path, version: int) -> None:
        check_version_file(path, version)
        self._order({"load": version})
        self._version = version

    def _launch(self, spec: EngineSpec) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([sys.executable, "-S", "-c", SAMPLER], stdin=pipe, stdout=pipe, text=True)

    def _end(self) -> None:
        process, self._process, self._version = self._process, None, -1
        if process is not None:
            process.kill()
            process.wait(10)

    def _order(self, order: dict) -> dict:
        number = self._restarts.num_starts
        with self._lock:
            try:
                assert self._process is not None
                self._process.stdin.write(json.dumps(order) + "\n")
                self._process.stdin.flush()
                return json.loads(self._process.stdout.readline())
            except (OSError, ValueError) as error:
                raise EngineLostError(f"the sampler has ended ({error})", number) from error
