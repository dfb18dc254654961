import csv
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import Precision

from fuchsia_pl.batch import StaleBatchError, StepInfo
from fuchsia_pl.callbacks.adapter_sync import AdapterSync
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.objectives.loss import policy_loss
from fuchsia_pl.objectives.presets import PRESETS
from fuchsia_pl.rollouts.batcher import count_denominators, make_batches, split_balanced
from fuchsia_pl.samples import Sample
from fuchsia_pl.types import Completion, ConfigError, Rollout, Turn
from tests.doubles import TinyEngine, make_data, make_module, make_sample, make_trainer

# Ten rows of different lengths and advantages, so that 1, 2 and 5 micro-batches are all possible.
SAMPLES = [
    make_sample([5] * (1 + row % 4), [6 + (row * token) % 30 for token in range(1, 2 + row % 5)], row / 4 - 1.0)
    for row in range(10)
]


CRITIC = {"loss_type": "ppo", "advantage": "gae"}
OBJECTIVES = {
    **{name: {"loss_type": name} for name in sorted(PRESETS)},
    **{f"grpo, {name}": {"loss_type": "grpo", "reduction": name} for name in ("token_mean", "constant")},
    "ppo with a critic": CRITIC,
    "gspo per token": {"loss_type": "gspo", "ratio_level": "sequence_token"},
}


def step_gradient(module, samples, num_micro_batches: int, padding: int = 0, shares=False) -> list[torch.Tensor]:
    """The gradient that one optimizer step sees: the sum over its micro-batches.

    The old logprobs are half way to the sampler's, so that ratios and sampler weights are on both sides of their bounds.
    """
    module.zero_grad()
    for batch in make_batches(
        split_balanced(samples, num_micro_batches, shares), StepInfo(0, count_denominators(samples, 8), 0)
    ):
        batch = padded(batch, padding)
        reference = module.policy.reference_logprobs(batch) if module.loss_config.kl_in_loss else None
        policy_output = module.policy.output(batch)
        old = 0.5 * (policy_output.logprobs.detach() + batch.sampling_logprobs)
        policy_loss(module.loss_config, batch, policy_output, old, old, reference).loss.backward()
    return [parameter.grad.clone() for parameter in module.policy.trainable_parameters()]


def padded(batch, columns: int):
    """The batch with additional columns on the right, filled with arbitrary values except for the mask."""
    nonsense = {torch.int64: 7, torch.float32: 3.5, torch.bool: False}
    tensors = {
        name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor) and value.ndim == 2
    }
    return replace(
        batch,
        **{
            name: torch.nn.functional.pad(tensor, (0, columns), value=nonsense[tensor.dtype])
            for name, tensor in tensors.items()
        },
    )


def randomised_module(tiny_model, loss: LossConfig):
    module = make_module(tiny_model, loss)
    module.configure_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.policy.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_the_gradient_is_the_same_for_any_split_order_padding_and_shared_prefix(tiny_model, objective):
    samples = SAMPLES
    if objective == "ppo with a critic":
        samples = [
            replace(
                s, old_values=tuple(0.1 * a for a in s.advantages), value_targets=tuple(a + 0.3 for a in s.advantages)
            )
            for s in SAMPLES
        ]
    settings = {"beta": 0.1, "kl_in": "loss", "entropy_weight": 0.05, **OBJECTIVES[objective]}
    module = randomised_module(tiny_model, LossConfig(**settings))
    whole = step_gradient(module, samples, 1)
    largest = max(gradient.abs().max().item() for gradient in whole)
    assert largest > 1e-3
    shuffled = [samples[index] for index in (3, 9, 1, 0, 7, 5, 2, 8, 6, 4)]
    splits = [(samples, 2, 0), (samples, 5, 0), (shuffled, 1, 0), (shuffled, 5, 0), (samples, 2, 6)]
    shared = [
        (samples, 1, 0, True),
        (shuffled, 3, 0, True),
        (samples, 2, 6, True),
    ]  # one group of ten, halved as needed
    for split in [*splits, *shared]:
        for got, expected in zip(step_gradient(module, *split), whole, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * largest)


def test_a_truncated_row_without_trained_tokens_leaves_the_gradient_as_it_was(tiny_model):
    module = randomised_module(tiny_model, LossConfig())
    before = step_gradient(module, SAMPLES, 2)
    for got, expected in zip(step_gradient(module, [*SAMPLES, make_sample([5, 6], [], 3.0)], 2), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def train(tiny_model, root, accumulate: int, loss: LossConfig | None = None, environment=None, **settings) -> tuple:
    """Three steps of plain gradient descent: unlike Adam's, its steps are as long as its gradients."""
    torch.manual_seed(0)
    summed = loss is not None and loss.parts.constant_length == 1  # whose gradients are about 20 times as long
    module = make_module(tiny_model, loss, optimizer=partial(torch.optim.SGD, lr=0.01 if summed else 0.3))
    module.configure_model()
    data = make_data(module, TinyEngine(), environment, batch_size=4, steps_per_epoch=3)
    trainer = make_trainer(root, accumulate_grad_batches=accumulate, **settings)
    trainer.fit(module, datamodule=data)
    return module, trainer


def test_a_trainer_run_ends_with_the_same_weights_for_any_accumulation(tiny_model, tmp_path):
    one, first = train(tiny_model, tmp_path / "1", accumulate=1)
    assert max(p.abs().max() for name, p in one.named_parameters() if "lora_B" in name) > 1e-2
    for accumulate in (2, 4):
        other, trainer = train(tiny_model, tmp_path / str(accumulate), accumulate)
        assert trainer.global_step == 3
        for name in ("train/grad_norm", "train/loss", "train/logprob_gap"):
            assert float(trainer.callback_metrics[name]) == pytest.approx(
                float(first.callback_metrics[name]), rel=1e-3, abs=1e-5
            )
        for got, expected in zip(other.policy.trainable_parameters(), one.policy.trainable_parameters(), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


TWO_RANKS = """
from pathlib import Path
import sys
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from fuchsia_pl.objectives.config import LossConfig
from tests.doubles import Constant, Spread
from tests.unit.test_module import OBJECTIVES, train

model, root = Path(sys.argv[1]), Path(sys.argv[2])
for number, (name, settings) in enumerate(OBJECTIVES.items()):
    folder = root / str(number)
    logger = CSVLogger(folder, name="", version="")
    loss = LossConfig(beta=0.01, **settings)
    several = {"accumulate": 2, "devices": 2, "strategy": "ddp", "log_every_n_steps": 1, "logger": logger}
    module, trainer = train(model, folder, loss=loss, **several)
    if trainer.is_global_zero:
        weights = {n: p.detach() for n, p in module.policy.named_parameters() if p.requires_grad}
        torch.save(weights, folder / "weights.pt")
for name, environment in {"refilled": Spread(num_items=40), "skipped": Constant()}.items():
    logger = CSVLogger(root / name, name="", version="")
    several = {"accumulate": 2, "devices": 2, "strategy": "ddp", "log_every_n_steps": 1, "logger": logger}
    train(model, root / name, loss=LossConfig("dapo", max_refills=1), environment=environment, **several)
"""


@pytest.fixture(scope="module")
def two_ranks(forkserver, tiny_model, tmp_path_factory) -> Path:
    """A folder per objective, written by two processes over gloo, each with its own engine and half of the items."""
    root = tmp_path_factory.mktemp("two")
    (root / "two.py").write_text(TWO_RANKS)
    done = forkserver.run(root / "two.py", tiny_model, root, num_ranks=2, cwd=root)
    assert done.returncode == 0, done.printed[-3000:]
    return root


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_two_ranks_end_with_the_weights_and_figures_of_one(tiny_model, tmp_path, two_ranks, objective):
    folder = two_ranks / str(list(OBJECTIVES).index(objective))
    logger = CSVLogger(tmp_path, name="", version="")
    loss = LossConfig(beta=0.01, **OBJECTIVES[objective])
    one, _ = train(tiny_model, tmp_path, accumulate=2, loss=loss, logger=logger, log_every_n_steps=1)
    found = torch.load(folder / "weights.pt", weights_only=True)
    expected = {name: p for name, p in one.policy.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)
    rows = [list(csv.DictReader((place / "metrics.csv").open())) for place in (folder, tmp_path)]
    for two, alone in zip(*rows, strict=True):
        assert two.keys() == alone.keys()
        for metric in two.keys() - {"epoch", "step", "sync/seconds", "perf/rollout_tokens_per_s"}:
            assert float(two[metric]) == pytest.approx(float(alone[metric]), rel=1e-3, abs=1e-4), metric


def test_two_ranks_that_drop_groups_unevenly_go_on_together(two_ranks):
    """Each rank refills its own share and drops groups without spread; both take the same steps, also if all are dropped."""
    refilled, skipped = (list(csv.DictReader((two_ranks / n / "metrics.csv").open())) for n in ("refilled", "skipped"))
    assert len(refilled) == len(skipped) == 3
    assert all(float(row["rollout/dropped_groups"]) > 0 for row in refilled)
    assert {float(row["train/skipped"]) for row in refilled} == {0.0}
    assert {float(row["rollout/dropped_groups"]) for row in skipped} == {8.0}  # 4 groups, and 4 that replaced them
    assert {float(row["train/skipped"]) for row in skipped} == {1.0}


def test_a_run_learns(tiny_model, tmp_path):
    """Tests all signs from reward to optimizer: after 20 steps, rewarded tokens are more frequent."""
    torch.manual_seed(0)
    module = make_module(tiny_model)
    data = make_data(module, TinyEngine(), batch_size=5, steps_per_epoch=20)
    rewards = []

    class Record(AdapterSync):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            rewards.append(batch.step.metrics["reward/even"])

    make_trainer(tmp_path, sync=Record(tolerance=1e-3)).fit(module, datamodule=data)
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.25


def test_beta_zero_never_runs_the_reference(tiny_model, tmp_path, monkeypatch):
    def refuse(*args):
        pytest.fail("the reference ran")

    class WithoutProbe(AdapterSync):
        def on_train_batch_start(self, *args):
            pass

    monkeypatch.setattr("fuchsia_pl.policy.policy.Policy.reference_logprobs", refuse)
    module = make_module(tiny_model, LossConfig(beta=0.0))
    make_trainer(tmp_path, sync=WithoutProbe(), max_steps=2).fit(module, datamodule=make_data(module))
    assert "train/kl" not in module.trainer.callback_metrics


def test_the_kl_grows_from_zero_once_the_policy_moves(tiny_model, tmp_path):
    module = make_module(tiny_model, LossConfig(beta=0.01))
    values = []

    class Record(AdapterSync):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            values.append(pl_module.step_metrics["train/kl"].item())

    make_trainer(tmp_path, sync=Record(tolerance=1e-3)).fit(module, datamodule=make_data(module))
    assert values[0] == 0.0
    assert values[1] > 0


def test_rollouts_of_other_weights_are_refused(tiny_model):
    module = make_module(tiny_model)
    batch = make_batches(split_balanced(SAMPLES, 1), StepInfo(0, count_denominators(SAMPLES, 8), 3))[0]
    with pytest.raises(StaleBatchError, match="step 0 received rollouts of policy version 3"):
        module.training_step(batch, 0)


def test_a_plugin_that_rounds_the_trained_weights_is_refused(tiny_model, tmp_path):
    """Independent of its name; Lightning's own strategies are refused by name before the engine starts."""

    class Rounds(Precision):
        def convert_module(self, module):
            return module.to(torch.bfloat16)

    module = make_module(tiny_model)
    with pytest.raises(ConfigError, match=r"trained weights are \['torch.bfloat16'\], and must be float32"):
        make_trainer(tmp_path, plugins=[Rounds()]).fit(module, datamodule=make_data(module))


def test_a_strategy_that_does_not_average_over_all_ranks_is_refused(tiny_model, monkeypatch):
    """Lightning's own ModelParallelStrategy treats the ranks of a machine as parts of one model."""
    module = make_module(tiny_model)
    module._device_mesh = {"data_parallel": SimpleNamespace(size=lambda: 1)}
    module._trainer = SimpleNamespace(world_size=2)
    with pytest.raises(
        ConfigError, match=r"averages over 1 of 2 ranks, whose weights would diverge: use .*FSDP2Strategy"
    ):
        module.configure_model()


def test_without_lora_all_weights_train_and_are_synced(tiny_model, tmp_path):
    module = make_module(tiny_model, LossConfig(beta=0.01), enabled=False)
    assert module.learner.served_model.lora_rank == 0
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(module, datamodule=make_data(module))  # the sync's tolerance of 1e-3 holds at both steps
    assert trainer.global_step == 2


def test_a_scheduler_steps_once_per_optimizer_step(tiny_model, tmp_path):
    module = make_module(tiny_model)
    module.lr_scheduler = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trainer = make_trainer(tmp_path, accumulate_grad_batches=5)
    trainer.fit(module, datamodule=make_data(module))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**3)  # 3 steps of 5 micro-batches


def tool_conversation(tool_ids=(20, 21, 22), logprob=-1.0) -> Sample:
    """Prompt, turn, tool's answer, turn: P0 P1 | A0 A1 | E0 E1 E2 | B0 B1."""
    rollout = Rollout({}, item_index=0, sibling=0, temperature=1.0, prompt="")
    rollout.start([5, 6])
    for ids, answer in (((7, 8), list(tool_ids)), ((9, 2), [])):
        rollout.append(Turn(Completion(ids, (logprob,) * 2, "stop", None, policy_version=0), "", "", "", ""))
        rollout.append_environment(answer)
    rollout.finish()
    return Sample(rollout, (1.0, 1.0, 0.5, 0.5))


def loss_and_scores(module, batch):
    policy_output = module.policy.output(batch)
    loss = policy_loss(
        module.loss_config, batch, policy_output, policy_output.logprobs.detach(), policy_output.logprobs.detach(), None
    ).loss
    return loss.detach(), policy_output.logprobs.detach()[0]


def test_a_tools_tokens_are_context_and_their_labels_are_nothing(tiny_model):
    module = randomised_module(tiny_model, LossConfig("cispo"))
    sample = tool_conversation()
    (batch,) = make_batches(split_balanced([sample], 1), StepInfo(0, count_denominators([sample], 8), 0))
    assert batch.loss_mask[0].tolist() == [False, True, True, False, False, False, True, True]
    assert batch.step.denominators.num_tokens == 4
    loss, logprobs = loss_and_scores(module, batch)

    other = tool_conversation(tool_ids=(30, 21, 22))
    (changed,) = make_batches(split_balanced([other], 1), StepInfo(0, count_denominators([other], 8), 0))
    changed_loss, changed_logprobs = loss_and_scores(module, changed)
    assert changed_loss != loss
    assert changed_logprobs[1:3].equal(logprobs[1:3])  # the part before the tool
    assert not changed_logprobs[6:].isclose(logprobs[6:]).any()  # the part after it

    labels = batch.labels.clone()
    labels[0, 3:6] = torch.tensor([31, 32, 33])
    relabelled_loss, relabelled = loss_and_scores(module, replace(batch, labels=labels))
    assert relabelled_loss.equal(loss)
    assert relabelled.equal(logprobs)


def test_a_tools_labels_reach_no_gradient(tiny_model):
    module = randomised_module(tiny_model, LossConfig("grpo"))
    sample = tool_conversation()
    (batch,) = make_batches(split_balanced([sample], 1), StepInfo(0, count_denominators([sample], 8), 0))
    gradients = []
    for label in (20, 33):
        labels = batch.labels.clone()
        labels[0, 3:6] = label
        module.zero_grad()
        policy_output = module.policy.output(replace(batch, labels=labels))
        old = policy_output.logprobs.detach()
        policy_loss(module.loss_config, replace(batch, labels=labels), policy_output, old, old, None).loss.backward()
        gradients.append([p.grad.clone() for p in module.policy.trainable_parameters()])
    assert all(first.equal(second) for first, second in zip(*gradients, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in gradients[0])


@pytest.mark.parametrize("setting", ["num_policy_updates", "mini_batches"])
def test_a_phase_ends_with_the_last_micro_batch_of_its_last_step(tiny_model, tmp_path, setting):
    """Two phases of two steps in two micro-batches each."""
    ends = []

    class Record(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            ends.append(pl_module.ends_phase(batch_idx))

    module = make_module(tiny_model, LossConfig(**{setting: 2}))
    trainer = make_trainer(tmp_path, Record(), accumulate_grad_batches=2, max_steps=4)
    trainer.fit(module, datamodule=make_data(module, steps_per_epoch=4, batch_size=4))
    assert ends == [False, False, False, True] * 2
