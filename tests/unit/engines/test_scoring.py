"""`Engine.score` against the trainer's logprobs of the same ids."""

import asyncio
from pathlib import Path

import pytest
import torch

from fuchsia_pl.batch import StepInfo
from fuchsia_pl.engines.base import VERSION_FILE, EngineError, EngineSpec
from fuchsia_pl.policy.config import LoRASettings, PolicyConfig
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.rollouts.batcher import make_batches, split_balanced
from fuchsia_pl.types import ServedModel
from tests.doubles import RecordedEngine, SayingEngine, TinyEngine, denominators, make_sample

ROW = [5, 8, 9, 10, 11, 2]


def test_scores_agree_with_the_trainers_logprobs_of_the_same_ids(tiny_model, tmp_path):
    torch.manual_seed(1)
    config = PolicyConfig(str(tiny_model), "float32", lora=LoRASettings(r=4, alpha=8))
    policy = Policy(config, tiny_model, with_reference=False)
    engine, folder = TinyEngine(), tmp_path / "weights"
    engine.start(EngineSpec(ServedModel(str(tiny_model), "float32", 4, Path), 40, 0, tmp_path / "engine.log"))
    sample = make_sample(ROW[:1], ROW[1:], advantage=1.0)  # every id after the first counts as sampled
    (batch,) = make_batches(split_balanced([sample], 1), StepInfo(0, denominators(num_tokens=5), 0))
    seen = []
    for version in (0, 1):
        policy.save_trained(folder)
        (folder / VERSION_FILE).write_text(str(version))
        asyncio.run(engine.load_weights(folder, version))
        scored = asyncio.run(engine.score(ROW))
        assert len(scored) == len(ROW) - 1
        trainer = policy.evaluated_output(batch).logprobs[batch.loss_mask]
        torch.testing.assert_close(torch.tensor(scored), trainer, atol=1e-4, rtol=0)
        seen.append(scored)
        with torch.no_grad():
            for parameter in policy.trainable_parameters():
                parameter.add_(0.1)
    assert max(abs(one - other) for one, other in zip(*seen, strict=True)) > 0.1  # the load was needed


def test_a_double_with_constant_logprobs_scores_the_same_ones():
    assert asyncio.run(RecordedEngine().score(ROW)) == (-1.5,) * 5


def test_an_engine_that_cannot_score_raises():
    with pytest.raises(EngineError, match="SayingEngine cannot compute logprobs of given ids"):
        asyncio.run(SayingEngine(None).score(ROW))
