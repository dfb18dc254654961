"""The real engine, started once for several runs of one test file."""

from typing import ClassVar

from fuchsia_pl.engines.base import EngineSpec
from fuchsia_pl.engines.vllm_colocated import VLLMColocatedEngine


class KeptEngine(VLLMColocatedEngine):
    """vLLM that runs before and after each run; every run first loads its own weights."""

    running: ClassVar["dict[int, KeptEngine]"] = {}  # by max_length

    def __new__(cls) -> "KeptEngine":
        """The only engine."""
        return cls.running.setdefault(0, super().__new__(cls))

    def __init__(self) -> None:
        if self.__dict__:
            return
        super().__init__(kv_cache_gb=1.0, max_num_seqs=64, enforce_eager=True)

    def start(self, spec: EngineSpec) -> None:
        assert self._spec is None or self._spec.max_length == spec.max_length
        super().start(spec)
        self._version = -1

    def close(self) -> None: ...

    @classmethod
    def end(cls) -> None:
        for engine in cls.running.values():
            VLLMColocatedEngine.close(engine)
        cls.running.clear()
