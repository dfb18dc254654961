"""Fuchsia-PL: reinforcement learning of language models on PyTorch Lightning.

Each name is imported from its module when it is first used, so `import fuchsia_pl` loads neither torch nor vLLM.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fuchsia_pl.callbacks.adapter_sync import AdapterSync
    from fuchsia_pl.callbacks.defaults import default_callbacks
    from fuchsia_pl.datamodule import RolloutDataModule
    from fuchsia_pl.engines.vllm_colocated import VLLMColocatedEngine
    from fuchsia_pl.module import GRPOModule
    from fuchsia_pl.objectives.config import LossConfig
    from fuchsia_pl.policy.config import LoRASettings, PolicyConfig
    from fuchsia_pl.rollouts.config import SamplingConfig

__version__ = "0.1.0"  # pyproject.toml reads this line

__all__ = [
    "AdapterSync",
    "GRPOModule",
    "LoRASettings",
    "LossConfig",
    "PolicyConfig",
    "RolloutDataModule",
    "SamplingConfig",
    "VLLMColocatedEngine",
    "default_callbacks",
]

_MODULES = {
    "AdapterSync": "fuchsia_pl.callbacks.adapter_sync",
    "GRPOModule": "fuchsia_pl.module",
    "LoRASettings": "fuchsia_pl.policy.config",
    "LossConfig": "fuchsia_pl.objectives.config",
    "PolicyConfig": "fuchsia_pl.policy.config",
    "RolloutDataModule": "fuchsia_pl.datamodule",
    "SamplingConfig": "fuchsia_pl.rollouts.config",
    "VLLMColocatedEngine": "fuchsia_pl.engines.vllm_colocated",
    "default_callbacks": "fuchsia_pl.callbacks.defaults",
}

if not TYPE_CHECKING:  # type checkers would accept any attribute name because of this function

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(importlib.import_module(_MODULES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
