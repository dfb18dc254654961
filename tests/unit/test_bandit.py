"""Every objective learns the simplest task: to write one given token."""

from functools import cache

import pytest
import torch

from fuchsia_pl.batch import Denominators, StepInfo, TrainerSignals
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.objectives.loss import policy_loss
from fuchsia_pl.objectives.presets import PRESETS
from fuchsia_pl.policy.config import LoRASettings, PolicyConfig
from fuchsia_pl.policy.policy import Policy
from fuchsia_pl.rollouts.batcher import count_denominators, make_batches, split_balanced
from fuchsia_pl.rollouts.credit import make_groups, make_samples, penalise_overlong, signals_of
from fuchsia_pl.rollouts.mini_batches import split_rows
from fuchsia_pl.samples import RolloutGroup, Sample
from fuchsia_pl.types import Completion, Rollout, RolloutStatus, Turn

PROMPT, LENGTH, GROUPS, SIBLINGS, MAX_STEPS = [5, 6], 2, 8, 8, 200
VARIANTS = {
    **{name: {"loss_type": name} for name in sorted(PRESETS)},
    "ppo with a critic": {"loss_type": "ppo", "advantage": "gae"},
    "reinforce_pp with baseline": {"loss_type": "reinforce_pp", "advantage": "group_mean_batch_norm"},
    "gspo per token": {"loss_type": "gspo", "ratio_level": "sequence_token"},
    # ratios differ from 1, so that bounds and gates act
    **{f"{name}, 3 updates": {"loss_type": name, "num_policy_updates": 3} for name in ("grpo", "cispo", "sapo", "ppo")},
    # one ratio for both tokens of a row: with 3 updates of this learning rate it ends with one of them right
    "gmpo, 2 updates": {"loss_type": "gmpo", "num_policy_updates": 2},
    **{f"{name}, 4 mini-batches": {"loss_type": name, "mini_batches": 4} for name in ("dapo", "gspo")},
    "ppo with a critic, 2 mini-batches, 2 updates": {
        "loss_type": "ppo",
        "advantage": "gae",
        "mini_batches": 2,
        "num_policy_updates": 2,
    },
}


@torch.no_grad()
def next_distribution(policy: Policy, ids: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(policy.causal_lm(input_ids=ids).logits[:, -1].float(), dim=-1)


def sample_step(policy: Policy, target: int, generator: torch.Generator) -> list[list[Rollout]]:
    """Groups of rollouts of two tokens. The reward is the share of the target token."""
    ids, logprobs = torch.tensor([PROMPT]).repeat(GROUPS * SIBLINGS, 1), []
    for _ in range(LENGTH):
        distribution = next_distribution(policy, ids)
        token = torch.multinomial(distribution.exp(), 1, generator=generator)
        logprobs.append(distribution.gather(1, token))
        ids = torch.cat([ids, token], dim=1)
    rollouts = []
    for row, own in zip(ids[:, len(PROMPT) :].tolist(), torch.cat(logprobs, dim=1).tolist(), strict=True):
        rollout = Rollout({}, 0, 0, 1.0, "", reward=row.count(target) / LENGTH)
        rollout.start(list(PROMPT))
        rollout.append(Turn(Completion(tuple(row), tuple(own), "stop", None, policy_version=0), "", "", "", ""))
        rollout.finish(RolloutStatus.COMPLETED)
        rollouts.append(rollout)
    return [rollouts[start : start + SIBLINGS] for start in range(0, len(rollouts), SIBLINGS)]


def values_of(policy: Policy, groups: list[RolloutGroup]) -> TrainerSignals:
    samples = [Sample(rollout, (0.0,) * LENGTH) for group in groups for rollout in group.rollouts]
    batches = make_batches(split_balanced(samples, 1), StepInfo(0, Denominators(1, 1, 1, 1), 0))
    signals = [TrainerSignals(None, policy.evaluated_output(batch).values) for batch in batches]
    return signals_of(groups, batches, signals)


@cache
def chosen_target(folder) -> int:
    """A token that the untrained model samples with a moderate frequency."""
    policy = Policy(PolicyConfig(str(folder), "float32", LoRASettings(enabled=False)), folder, with_reference=False)
    return int(next_distribution(policy, torch.tensor([PROMPT]))[0].sort(descending=True).indices[8])


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_the_token_is_learned_within_200_steps(tiny_model, variant):
    config = LossConfig(**VARIANTS[variant])
    torch.manual_seed(0)
    settings = PolicyConfig(str(tiny_model), "float32", LoRASettings(enabled=False))
    with_critic = config.parts.advantage == "gae"
    policy = Policy(settings, tiny_model, with_reference=False, with_critic=with_critic)
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-3, weight_decay=0.0)
    target, generator = chosen_target(tiny_model), torch.Generator().manual_seed(0)
    before = next_distribution(policy, torch.tensor([PROMPT]))[0, target].exp().item()
    assert before < 0.05
    for _ in range(MAX_STEPS):
        groups = make_groups(sample_step(policy, target, generator))
        penalise_overlong(config, groups, max_completion_tokens=2 * LENGTH)
        signals = values_of(policy, groups) if with_critic else TrainerSignals(None, None)
        samples = make_samples(config, groups, {}, signals, lambda values: values)
        if not any(any(sample.advantages) for sample in samples):
            continue  # as the module skips such a step
        steps = [
            make_batches(split_balanced(rows.samples, 2), StepInfo(0, count_denominators(rows.samples, 2 * LENGTH), 0))
            for rows in split_rows(groups, samples, config.mini_batches)
        ]
        before_updates = [[policy.evaluated_output(batch).logprobs for batch in batches] for batches in steps]
        for _ in range(config.num_policy_updates):
            for batches, olds in zip(steps, before_updates, strict=True):
                optimizer.zero_grad()
                for batch, old in zip(batches, olds, strict=True):
                    policy_loss(config, batch, policy.output(batch), old, old, None).loss.backward()
                optimizer.step()
        # the token at both places: after the prompt, and after the prompt and itself
        places = [torch.tensor([PROMPT]), torch.tensor([[*PROMPT, target]])]
        if min(next_distribution(policy, ids)[0, target].exp().item() for ids in places) >= 0.95:
            return
    pytest.fail(f"not learned in {MAX_STEPS} steps")
