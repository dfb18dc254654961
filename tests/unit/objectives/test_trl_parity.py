"""The same tensors give the loss and the gradient of TRL, computed by TRL's own trainers.

A trainer is made without its constructor; tensors replace the results of model, engine and reward function. Its
`_generate_and_score_completions` then makes advantages and the weights of the sampler correction, its `_compute_loss`
the loss.

Where the two differ by convention: TRL takes means over a micro-batch and all of its rows, we over the step and its
rows with a trained token, so here one micro-batch is the step and every row has one. To TRL a sampling logprob that is
NaN is no correction, with us it gives NaN, so here there is none. TRL's unbiased KL takes the surrogate's ratio, ours
always the token's (DeepSeek-V3.2, equation 7), so the two are the same with a ratio per token.
"""

import warnings
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fuchsia_pl.batch import Batch, Denominators, PolicyOutput, StepInfo
from fuchsia_pl.objectives.advantages import group_mean_advantages, group_norm_advantages, leave_one_out_advantages
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.objectives.corrections import SamplerCorrection
from fuchsia_pl.objectives.loss import LossOutput, policy_loss
from fuchsia_pl.objectives.surrogates import SAPOSettings, ratio_log

LENGTHS = (5, 2, 7, 3, 6, 4, 7, 7)
MAX_COMPLETION = 16
REWARDS = torch.tensor([[0.0, 1.0, 0.7, 0.2], [0.9, 0.1, 0.3, 1.0]], dtype=torch.float64)
# Siblings that differ, one that was not scored, none that differ, only one that was scored, none that was.
NAN = float("nan")
HARD_REWARDS = [[0.1, 1.0, 0.7, 0.2], [0.5, NAN, 2.0, 0.0], [0.3] * 4, [NAN, NAN, 1.0, NAN], [NAN] * 4]

ABSENT = (
    "environment_factories environments tools pad_to_multiple_of mask_truncated_completions off_policy_mask_threshold "
    "aux_loss_enabled reward_clip_range normalize_advantages use_vllm use_adaptive_entropy _entropy_bonus_enabled"
)
ATTRIBUTES = dict.fromkeys(ABSENT.split()) | {
    "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
    "ref_model": "reference",
    "_tokenizer": SimpleNamespace(pad_token_id=0),
    "reward_funcs": ["reward"],
    "reward_func_names": ["reward"],
    "reward_weights": torch.ones(1),
    "num_generations": REWARDS.shape[1],
    "num_iterations": 2,  # with 1, TRL uses the policy's own logprobs as the old ones
    "multi_objective_aggregation": "sum_then_normalize",
    "scale_rewards": "group",
    "loss_type": "grpo",
    "importance_sampling_level": "token",
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "beta": 0.0,
    "top_entropy_quantile": 1.0,
    "current_gradient_accumulation_steps": 1,
    "max_completion_length": MAX_COMPLETION,
    "vllm_importance_sampling_correction": True,
}
ONE = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
ARGUMENTS = dict.fromkeys(ONE, 1) | dict.fromkeys(["gradient_checkpointing_kwargs", "use_bias_correction_kl", "delta"])
PROCESS = {"device": torch.device("cpu"), "num_processes": 1, "process_index": 0, "is_main_process": True}
PROCESS |= {"gather": lambda x: x, "reduce": lambda x, reduction: x}


@dataclass(frozen=True)
class Tokens:
    """Logprobs of policy, reference and engine for the completions, [B, T]; `own` is False at tokens of a tool."""

    policy: Tensor
    entropies: Tensor
    old: Tensor
    sampling: Tensor
    reference: Tensor
    present: Tensor
    own: Tensor


def make_tokens(lengths=LENGTHS, drift: float = 0.5, tools: bool = True) -> Tokens:
    """Tokens whose log ratios between policy and old policy are of the size of `drift`."""
    shape = len(lengths), max(lengths)
    generator = torch.Generator().manual_seed(13)
    noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(5)]
    policy, entropies = (noise[0] - 3.0).requires_grad_(), noise[1].abs().requires_grad_()
    old, reference = policy.detach() - drift * noise[2], policy.detach() + 0.4 * noise[3]
    sampling = (old - 0.6 * noise[4]).float()  # TRL keeps them in this type
    present = torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(1)
    own = torch.ones(shape, dtype=torch.bool)
    if tools:
        own[2, 1:3] = own[-1, 3:5] = False
    return Tokens(policy, entropies, old, sampling, reference, present, own)


@pytest.fixture(scope="module")
def trl() -> SimpleNamespace:
    with warnings.catch_warnings():
        # It names the vLLM releases it was tested with; no vLLM is started here.
        warnings.simplefilter("ignore")
        from trl import GRPOTrainer, RLOOTrainer
    return SimpleNamespace(grpo=GRPOTrainer, rloo=RLOOTrainer)


def of_trl(trainer_class, tokens: Tokens, attributes=None, arguments=None, rewards=REWARDS) -> tuple[Tensor, Tensor]:
    """TRL's loss and advantages."""
    lengths = tokens.present.sum(dim=1).tolist()
    ids, written, sampled = (
        [row[:length] for row, length in zip(values.tolist(), lengths, strict=True)]
        for values in (tokens.present.long(), tokens.own.long(), tokens.sampling)
    )
    prompts, texts = [[1, 2]] * len(ids), [""] * len(ids)
    with_tools = prompts, ids, written, texts, sampled, {}, None, None
    generated = (prompts, ids, texts) if trainer_class.__name__ == "RLOOTrainer" else with_tools

    def score(model, *args, compute_entropy=False, **kwargs):
        if compute_entropy:  # used by the loss alone
            return tokens.policy, tokens.entropies, None
        return tokens.reference if model == "reference" else tokens.old, None, None

    trainer = trainer_class.__new__(trainer_class)
    vars(trainer).update({**ATTRIBUTES, **(attributes or {})})
    trainer.args = SimpleNamespace(**{**ARGUMENTS, **(arguments or {})})
    trainer.accelerator = SimpleNamespace(**PROCESS, sync_gradients=True)
    trainer._metrics = {"train": defaultdict(list)}
    trainer._logs = defaultdict(list, rewards=defaultdict(list))
    trainer._pending_extra_logs, trainer._pending_metrics = {}, {}
    trainer._get_per_token_logps_and_entropies = score
    trainer._generate = lambda prompts: generated
    trainer._calculate_rewards = lambda *given: rewards.reshape(-1, 1)
    inputs = trainer._generate_and_score_completions([{"prompt": ""}] * len(ids))
    return trainer._compute_loss(trainer.model, inputs), inputs["advantages"]


def of_ours(settings, tokens: Tokens, advantages: Tensor) -> LossOutput:
    config = LossConfig(**{"sampler_correction": SamplerCorrection("disabled"), **settings})
    mask = tokens.present & tokens.own
    denominators = Denominators(int(mask.sum()), int(mask.any(dim=1).sum()), MAX_COMPLETION, int(mask.sum()))
    ids, advantages = mask.long(), advantages.unsqueeze(1) * mask
    batch = Batch(
        ids, ids, mask, tokens.sampling, advantages, torch.ones(len(mask)), (), (), StepInfo(0, denominators, 0), ()
    )
    policy_output = PolicyOutput(tokens.policy, tokens.entropies, None)
    return policy_loss(config, batch, policy_output, tokens.old, tokens.old, tokens.reference)


def assert_same(ours: Tensor, theirs: Tensor, tokens: Tokens) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
    assert_same_gradient(ours, theirs, tokens)


def assert_same_gradient(ours: Tensor, theirs: Tensor, tokens: Tokens) -> None:
    learned = [tokens.policy, tokens.entropies]
    own, other = (torch.autograd.grad(loss, learned, materialize_grads=True) for loss in (ours, theirs))
    torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-8)
    assert other[0].abs().amax() > 1e-3


@pytest.mark.parametrize(("level", "drift", "low", "high"), [("token", 0.5, 0.2, 0.5), ("sequence", 1e-3, 3e-4, 4e-4)])
def test_ratios_lie_within_and_beyond_both_bounds_under_advantages_of_both_signs(level, drift, low, high):
    tokens = make_tokens(drift=drift)
    mask = tokens.present & tokens.own
    ratio = ratio_log(level, tokens.policy, tokens.old, mask).exp()
    raised = (group_norm_advantages(REWARDS) > 0).reshape(-1, 1)
    for kept in ratio[mask & raised], ratio[mask & ~raised]:
        assert set(torch.bucketize(kept, torch.tensor([1 - low, 1 + high])).tolist()) == {0, 1, 2}


SEQUENCE = {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4}
DAPO = {"loss_type": "dapo", "epsilon_high": 0.28}
SAPO = {"loss_type": "sapo", "sapo": SAPOSettings(0.6, 2.0)}
UNBIASED, BIAS_CORRECTED = {"beta": 0.3, "kl_estimator": "k3_unbiased"}, {"use_bias_correction_kl": True}
# Ours, then TRL's attributes and arguments.
SAME = {
    "grpo": ({}, {}, {}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"loss_type": "dr_grpo", "scale_rewards": "none"}, {}),
    "dapo": ({"loss_type": "dapo"}, DAPO, {}),
    "token_mean_is_bnpo": ({"reduction": "token_mean"}, {"loss_type": "bnpo"}, {}),
    "gspo": ({"loss_type": "gspo"}, SEQUENCE, {}),
    # With one advantage per row GSPO-token is GSPO.
    "gspo_token": ({"loss_type": "gspo", "ratio_level": "sequence_token"}, SEQUENCE, {}),
    # TRL bounds the ratio itself, we its distance from 1.
    "cispo": ({"loss_type": "cispo", "clip_high": 0.5}, {"loss_type": "cispo", "epsilon_high": 1.5}, {}),
    "sapo": (SAPO, {"loss_type": "sapo"}, {"sapo_temperature_pos": 0.6, "sapo_temperature_neg": 2.0}),
    # TRL's delta bounds the ratio under either sign. From 1 + clip_high on it does nothing to a positive advantage,
    # whose ratio is bounded there already, and is our bound under a negative one; a smaller delta is another objective.
    "dual_clip_is_delta": ({"dual_clip": 1.5}, {}, {"delta": 1.5}),
    "dual_clip_at_the_upper_bound": ({"loss_type": "dapo", "dual_clip": 1.28}, DAPO, {"delta": 1.28}),
    "k3": ({"beta": 0.3}, {"beta": 0.3}, {}),
    "k3_unbiased": (UNBIASED, {"beta": 0.3}, BIAS_CORRECTED),
    "entropy": ({"entropy_weight": 0.2}, {"_entropy_bonus_enabled": True, "entropy_coef": 0.2}, {}),
}


@pytest.mark.parametrize(("ours", "attributes", "arguments"), SAME.values(), ids=SAME)
def test_loss_and_gradient_are_those_of_trl(trl, ours, attributes, arguments):
    tokens = make_tokens(drift=1e-3 if attributes is SEQUENCE else 0.5)
    loss, advantages = of_trl(trl.grpo, tokens, attributes, arguments)
    assert_same(of_ours(ours, tokens, advantages).loss, loss, tokens)


DIFFERENT = {f"{name}_and_grpo": ({}, *theirs) for name, (_, *theirs) in SAME.items() if name != "grpo"} | {
    "delta_below_the_upper_bound": ({"dual_clip": 1.1}, {}, {"delta": 1.1}),
    "unbiased_kl_per_sequence": ({"loss_type": "gspo", **UNBIASED}, SEQUENCE | {"beta": 0.3}, BIAS_CORRECTED),
}


@pytest.mark.parametrize(("ours", "attributes", "arguments"), DIFFERENT.values(), ids=DIFFERENT)
def test_another_objective_is_told_apart(trl, ours, attributes, arguments):
    tokens = make_tokens()
    loss, advantages = of_trl(trl.grpo, tokens, attributes, arguments)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(of_ours(ours, tokens, advantages).loss, loss, tokens)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_the_sampler_correction_is_that_of_trl_and_leaves_the_kl_alone(trl, level, mode):
    tokens = make_tokens()
    bounds = {"vllm_importance_sampling_clip_min": 0.6, "vllm_importance_sampling_clip_max": 1.8}
    corrected = {"use_vllm": True, "vllm_importance_sampling_mode": f"{level}_{mode}", **bounds}
    loss, advantages = of_trl(trl.grpo, tokens, {**corrected, "beta": 0.3})
    ours = {"beta": 0.3, "sampler_correction": SamplerCorrection(mode, level, 0.6, 1.8)}
    output = of_ours(ours, tokens, advantages)
    assert_same(output.loss, loss, tokens)
    assert 0.1 < output.metrics["train/sampler_bounded_fraction"] < 0.9


ADVANTAGES = [(group_norm_advantages, "group"), (group_mean_advantages, "none"), (leave_one_out_advantages, None)]


@pytest.mark.parametrize(("ours", "scale"), ADVANTAGES)
def test_advantages_are_those_of_trl(trl, ours, scale):
    rewards = torch.tensor(HARD_REWARDS, dtype=torch.float64)
    tokens = make_tokens((3,) * rewards.numel(), tools=False)
    _, advantages = of_trl(trl.grpo if scale else trl.rloo, tokens, {"scale_rewards": scale}, rewards=rewards)
    torch.testing.assert_close(ours(rewards).flatten(), advantages, rtol=1e-5, atol=1e-8)


# TRL's RLOO clips the ratio of the whole row, the product over its tokens, which none of our levels is: "sequence" is
# the geometric mean. The two meet where a row has one token, and in gradient where the ratio is 1.
def test_rloo_with_clip_is_that_of_trl_on_rows_of_one_token(trl):
    tokens = make_tokens((1,) * len(LENGTHS), tools=False)
    loss, advantages = of_trl(trl.rloo, tokens)
    assert_same(of_ours({"loss_type": "rloo", "surrogate": "clip"}, tokens, advantages).loss, loss, tokens)


@pytest.mark.parametrize("surrogate", ["reinforce", "clip"])
def test_rloo_has_the_gradient_of_trl_on_the_policy_that_sampled(trl, surrogate):
    tokens = make_tokens(drift=0.0, tools=False)
    loss, advantages = of_trl(trl.rloo, tokens)
    assert_same_gradient(of_ours({"loss_type": "rloo", "surrogate": surrogate}, tokens, advantages).loss, loss, tokens)
