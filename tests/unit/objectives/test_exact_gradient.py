# The mean of every estimator of the policy gradient, over all sequences of a policy small enough to write them down.
#
# A policy over the tokens {0, 1, END} writes at most 3 of them; its parameters are one row of logits per prefix. The exact
# gradient is autograd's of J = sum_s pi(s) R(s). An estimator's exact mean is the sum over all groups of G siblings of their
# probability times minus the gradient of `policy_loss`, for which a group is a whole optimizer step: no sampling error.
# An estimator that weighs sequence s by w(s) has the mean sum_s pi(s) w(s) R(s) grad log pi(s), the exact gradient for rewards
# w R with w held fixed; most biases are stated like that. Letters: S sequences, T positions, N groups, G siblings.

from itertools import product

import numpy as np
import pytest
import torch

import fuchsia_pl.objectives.advantages as ours
from fuchsia_pl.batch import Batch, Denominators, PolicyOutput, StepInfo
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.objectives.corrections import SamplerCorrection
from fuchsia_pl.objectives.kl import kl_estimate
from fuchsia_pl.objectives.loss import policy_loss
from fuchsia_pl.objectives.presets import PRESETS
from fuchsia_pl.objectives.returns import rewards_to_go
from fuchsia_pl.objectives.teacher import with_teacher

END, LONGEST, NO_BOUND, LEVELS = 2, 3, 1e6, ("token", "sequence", "sequence_token")
POLICY, CHANGE, DISTANCE = 0.6 * torch.randn(3, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
# OTHER sampled where POLICY did not: the policy before an update, or an engine's.
OTHER, REFERENCE = POLICY + CHANGE, POLICY + DISTANCE


class Tree:
    """Every sequence of at most `longest` tokens, padded on the right. `rewards` are [S]."""

    def __init__(self, longest, rewards):
        prefixes = [prefix for length in range(longest) for prefix in product((0, 1), repeat=length)]
        sequences = [(*prefix, END) for prefix in prefixes] + list(product((0, 1), repeat=longest))
        self.lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.float64)
        self.mask = torch.arange(longest) < self.lengths.unsqueeze(1)
        self.rows, self.tokens = torch.zeros(2, *self.mask.shape, dtype=torch.int64)
        for s, sequence in enumerate(sequences):
            for t, token in enumerate(sequence):
                self.rows[s, t], self.tokens[s, t] = prefixes.index(sequence[:t]), token
        self.rewards = torch.tensor(rewards, dtype=torch.float64)
        self.token_rewards = self.rewards.unsqueeze(1) * (torch.arange(longest) == self.lengths.unsqueeze(1) - 1)

    def logprobs(self, logits):
        return torch.where(self.mask, torch.log_softmax(logits, dim=1)[self.rows, self.tokens], 0.0)

    def probabilities(self, logits):
        return self.logprobs(logits).sum(dim=1).exp()


# In the order END, 0 END, 1 END, then 00 END, ..., 11 END, then 000, 001, ..., 111.
TREE = Tree(LONGEST, [0.3, 1.0, -0.6, 0.9, 0.1, 2.0, 0.4, 1.2, -0.9, 0.2, 3.0, 0.7, 0.8, -0.2, 1.6])
ONE_TOKEN = Tree(1, [0.5, -1.0, 2.0])


def gradient_of(objective):
    logits = POLICY.clone().requires_grad_()
    return torch.autograd.grad(objective(logits), logits)[0].flatten()


def exact(rewards, tree=TREE):
    return gradient_of(lambda logits: tree.probabilities(logits) @ rewards)


def advantages_of(config, groups, tree, token_rewards):
    returns, mask = rewards_to_go(token_rewards, tree.mask)[groups], tree.mask[groups]
    name = config.parts.advantage
    if name == "reward":
        return returns
    if name == "batch_norm":
        steps = map(torch.masked_select, returns, mask)
        normalised = [ours.batch_norm_advantages(step, ours.moments(step)) for step in steps]
        return torch.zeros_like(returns).masked_scatter(mask, torch.cat(normalised))
    return getattr(ours, f"{name}_advantages")(token_rewards.sum(dim=1)[groups]).unsqueeze(2) * mask


def batch_of(tree, group, sampling, advantages):
    mask, tokens = tree.mask[group], tree.tokens[group]
    sizes = Denominators(int(mask.sum()), len(group), LONGEST, int(mask.sum()))
    return Batch(tokens, tokens, mask, sampling, advantages, torch.ones(len(group)), (), (), StepInfo(0, sizes, 0), ())


def estimates(config, groups, tree=TREE, token_rewards=None, old=POLICY, sampler=POLICY):
    """Minus the gradient of each group's loss at POLICY, [N, parameters]."""
    # Siblings can be swapped, and a group that is drawn twice has one gradient: only those that differ are computed.
    groups, which = groups.sort(dim=1).values.unique(dim=0, return_inverse=True)
    advantages = advantages_of(config, groups, tree, tree.token_rewards if token_rewards is None else token_rewards)
    # Each loss sees its own slice of one leaf, so one backward gives the gradients of all groups by their logprobs.
    leaf = tree.logprobs(POLICY)[groups].requires_grad_()
    old, sampling, reference = (tree.logprobs(logits)[groups] for logits in (old, sampler, REFERENCE))
    losses = []
    for n, group in enumerate(groups):
        batch, policy_output = (
            batch_of(tree, group, sampling[n], advantages[n]),
            PolicyOutput(leaf[n], torch.zeros(1, 1), None),
        )
        losses.append(policy_loss(config, batch, policy_output, old[n], old[n], reference[n]).loss)
    by_logprob = torch.autograd.grad(torch.stack(losses).sum(), leaf)[0]
    jacobian = torch.autograd.functional.jacobian(tree.logprobs, POLICY).flatten(2)
    return -torch.einsum("ngt,ngtp->np", by_logprob, jacobian[groups])[which]


def mean_of(config, size=1, tree=TREE, sampler=POLICY, **others):
    """The exact mean of the estimates from groups of `size` siblings that `sampler` drew."""
    groups = torch.cartesian_prod(*[torch.arange(len(tree.lengths))] * size).reshape(-1, size)
    return tree.probabilities(sampler)[groups].prod(dim=1) @ estimates(config, groups, tree, sampler=sampler, **others)


def same(mean, expected):
    return torch.allclose(mean, expected, rtol=0, atol=1e-7)  # SAPO's tau is float32: 1e-8; all others agree to 1e-15


def normalised(r, of):
    return (r - of.mean()) / (of.std(ddof=1) + 1e-4)


EXACT, RATIO = exact(TREE.rewards), TREE.probabilities(POLICY) / TREE.probabilities(OTHER)
GEOMETRIC = exact(TREE.rewards * RATIO ** (1 / TREE.lengths) / RATIO)
# What each is documented to multiply grad log pi of each sibling by, given the rewards r and the lengths n of a group.
# On the policy that sampled, every surrogate's gradient is REINFORCE's, so presets differ by advantage and reduction alone.
FACTORS = {
    "reinforce": lambda r, n: r / len(r),
    "rloo": lambda r, n: (r - (r.sum() - r) / (len(r) - 1)) / len(r),
    "dr_grpo": lambda r, n: (r - r.mean()) / (len(r) * LONGEST),
    "reinforce_pp": lambda r, n: normalised(r, np.repeat(r, n)) / n.sum(),
    **dict.fromkeys(["ppo", "dapo", "cispo"], lambda r, n: normalised(r, r) / n.sum()),
    **dict.fromkeys(["grpo", "gspo", "sapo", "gmpo"], lambda r, n: normalised(r, r) / (len(r) * n)),
    "grpo constant": lambda r, n: normalised(r, r) / (len(r) * LONGEST),
    "reinforce sequence_mean": lambda r, n: r / (len(r) * n),
    "reinforce token_mean": lambda r, n: r / n.sum(),
}
NAMES = (*PRESETS, "grpo constant", "reinforce sequence_mean", "reinforce token_mean")
CONFIGS = {name: LossConfig(**dict(zip(("loss_type", "reduction"), name.split(), strict=False))) for name in NAMES}


def documented(factors, size):
    """The mean of sum_i factors_i grad log pi(s_i) over all groups, in plain numbers, without autograd or code under test."""
    table, lengths, rewards = np.exp(POLICY.numpy()), TREE.mask.sum(dim=1).numpy(), TREE.rewards.numpy()
    table /= table.sum(axis=1, keepdims=True)
    chances, scores, mean = np.ones(len(lengths)), np.zeros((len(lengths), *table.shape)), np.zeros(table.shape)
    for s, length in enumerate(lengths):
        for row, token in zip(TREE.rows[s, :length], TREE.tokens[s, :length], strict=True):
            chances[s] *= table[row, token]
            scores[s, row] += np.eye(3)[token] - table[row]  # d log softmax(z)_k / dz = e_k - softmax(z)
    for group in map(list, product(range(len(lengths)), repeat=size)):
        mean += chances[group].prod() * np.tensordot(factors(rewards[group], lengths[group]), scores[group], axes=1)
    return torch.tensor(mean.flatten())


@pytest.mark.parametrize("size", [2, 3])
def test_reinforce_and_rloo_are_unbiased_and_dr_grpo_is_up_to_a_constant(size):
    # RLOO's baseline b does not depend on the sequence itself, so E[b grad log pi] = E[b] grad sum_s pi(s) = 0.
    # Dr.GRPO: r_i - mean(r) = (G-1)/G (r_i - mean of the others), and 1/L is that of the constant length.
    for name, factor in {"reinforce": 1, "rloo": 1, "dr_grpo": (size - 1) / (size * LONGEST)}.items():
        assert same(mean_of(LossConfig(name), size), EXACT * factor)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_exact_mean_is_what_the_formula_says_and_turned_where_it_is_biased(name):
    mean = mean_of(CONFIGS[name], 2)
    assert same(mean, documented(FACTORS[name], 2))
    assert (torch.cosine_similarity(mean, EXACT, dim=0) < 0.99) == (name not in ("reinforce", "rloo", "dr_grpo"))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_mean_of_sampled_gradients_is_the_documented_one_within_its_error_bar(name):
    factor = {"reinforce": 1, "rloo": 1, "dr_grpo": 2 / 9}.get(name)
    expected = documented(FACTORS[name], 3) if factor is None else EXACT * factor
    drawn = torch.multinomial(TREE.probabilities(POLICY), 3 * 6000, True, generator=torch.Generator().manual_seed(0))
    sampled = estimates(CONFIGS[name], drawn.reshape(-1, 3))
    bar = 4 * sampled.std(dim=0) / len(sampled) ** 0.5
    assert ((sampled.mean(dim=0) - expected).abs() < bar).all()
    assert ((sampled.mean(dim=0) - EXACT).abs() < bar).all() == (factor == 1)


@pytest.mark.parametrize(
    ("surrogate", "level"), [*product(("clip", "cispo", "sapo"), LEVELS), ("gmpo", None), ("reinforce", None)]
)
def test_on_the_policy_that_sampled_every_surrogate_is_reinforce_in_each_group(surrogate, level):
    groups, config = torch.combinations(torch.arange(15)), LossConfig("rloo", surrogate=surrogate, ratio_level=level)
    assert same(estimates(config, groups), estimates(LossConfig("rloo"), groups))


def one_new_token_at_a_time(logits):
    """The mean reward if one token is sampled by the new policy and the rest by the other, summed over positions."""
    new, old = TREE.logprobs(logits), TREE.logprobs(OTHER)
    mixed = [torch.where(torch.arange(LONGEST) == t, new, old) for t in range(LONGEST)]
    return sum(logprobs.sum(dim=1).exp() @ TREE.rewards for logprobs in mixed)


@pytest.mark.parametrize(("surrogate", "level"), [*product(("clip", "cispo"), LEVELS), ("gmpo", None)])
def test_off_the_policy_ratios_without_bounds_are_unbiased_for_one_token_alone(surrogate, level):
    # E_old[w R score] = E_pi[w old / pi R score]. One token: w = pi / old. More: token ratios change one token at a time, and
    # the sequence's is w = (pi / old)^(1/n), its gradient at each of n tokens w / n score.
    config = LossConfig("reinforce", surrogate=surrogate, ratio_level=level, clip_low=1.0, clip_high=NO_BOUND)
    assert same(mean_of(config, 1, ONE_TOKEN, old=OTHER, sampler=OTHER), exact(ONE_TOKEN.rewards, ONE_TOKEN))
    mean = mean_of(config, old=OTHER, sampler=OTHER)
    assert same(mean, gradient_of(one_new_token_at_a_time) if level == "token" else GEOMETRIC)
    assert torch.cosine_similarity(mean, EXACT, dim=0) < 0.99


def test_a_later_mini_batch_needs_the_logprobs_of_the_phases_start():
    # OTHER sampled all mini-batches, and the first one moved the policy to POLICY. With OTHER's logprobs as the old ones, the
    # ratio removes the bias for one token. With those at the first use of the later rows it is 1, and the mean is that of
    # E_other[R score] = E_pi[other / pi R score].
    off = SamplerCorrection(mode="disabled")
    config = LossConfig("reinforce", surrogate="clip", clip_low=1.0, clip_high=NO_BOUND, sampler_correction=off)
    start, moved = (mean_of(config, 1, ONE_TOKEN, old=old, sampler=OTHER) for old in (OTHER, POLICY))
    back = ONE_TOKEN.probabilities(OTHER) / ONE_TOKEN.probabilities(POLICY)
    assert same(start, exact(ONE_TOKEN.rewards, ONE_TOKEN))
    assert same(moved, exact(ONE_TOKEN.rewards * back, ONE_TOKEN))
    assert not same(start, moved)


def test_corrections_of_the_sampler_remove_its_bias_as_documented():
    def corrected(mode, level="sequence", high=NO_BOUND):
        config = LossConfig("reinforce", sampler_correction=SamplerCorrection(mode, level, 0.0, high))
        return mean_of(config, sampler=OTHER)

    # E_engine[w R score] = E_pi[w engine / pi R score]: no bias is left for w = pi / engine.
    off, token, truncated = corrected("disabled"), corrected("truncate", "token"), corrected("truncate", high=1.1)
    assert same(corrected("truncate"), EXACT)
    assert same(token, gradient_of(one_new_token_at_a_time))
    assert 0.01 < (token - EXACT).norm() < (off - EXACT).norm()
    assert same(truncated, exact(TREE.rewards * RATIO.clamp(max=1.1) / RATIO))
    assert truncated.norm() < 0.95 * EXACT.norm()
    assert same(corrected("mask", high=1.1), exact(TREE.rewards * (RATIO <= 1.1)))
    assert same(corrected("truncate", "geometric"), GEOMETRIC)


def test_kl_estimators_have_the_values_and_gradients_that_are_documented():
    # Gradients: k1: E[score] = 0. k2: E[-d score], the KL's. k3: E[(1 - q/p) score] = -sum q grad log p, that of KL(q || p).
    p, q, nothing = ONE_TOKEN.logprobs(POLICY), ONE_TOKEN.logprobs(REFERENCE), torch.zeros(3, 1)
    there = gradient_of(lambda logits: (ONE_TOKEN.logprobs(logits).exp() * (ONE_TOKEN.logprobs(logits) - q)).sum())
    back = gradient_of(lambda logits: (q.exp() * (q - ONE_TOKEN.logprobs(logits))).sum())
    assert not same(there, back)
    for name, expected in {"k1": 0 * there, "k2": there, "k3": back, "k3_unbiased": there}.items():
        assert same((p.exp() * kl_estimate(name, p, q, p)).sum(), (p.exp() * (p - q)).sum()) == (name != "k2")
        config = LossConfig("reinforce", beta=1.0, kl_in="loss", kl_estimator=name)
        on, off = (-mean_of(config, 1, ONE_TOKEN, old, token_rewards=nothing, old=old) for old in (POLICY, OTHER))
        assert same(on, expected)
        assert same(off, there) == (name == "k3_unbiased")
    # As a reward k3 lacks its own derivative: grad E[k3] = E[k3 score] + E[grad k3], the last of which is `back`.
    assert same(mean_of(LossConfig("reinforce"), 1, ONE_TOKEN, token_rewards=kl_estimate("k3", p, q, p)), there - back)


@pytest.mark.parametrize(("name", "size"), [("reinforce", 1), ("rloo", 2)])
def test_k1_in_the_reward_has_the_gradient_of_the_kl_over_whole_sequences(name, size):
    # grad E[k1] = E[k1 score] + E[grad k1], the last of which is 0; what earlier tokens cost is a baseline for later ones.
    p, q = TREE.logprobs(POLICY), TREE.logprobs(REFERENCE)
    mean = mean_of(LossConfig(name), size, token_rewards=TREE.token_rewards - 0.3 * kl_estimate("k1", p, q, p))
    kl = gradient_of(lambda logits: TREE.probabilities(logits) @ (TREE.logprobs(logits) - q).sum(dim=1))
    assert same(mean, EXACT - 0.3 * kl)


def from_teacher(teacher, token_rewards, tree=TREE, weight=1.0, sampler=POLICY, config=CONFIGS["reinforce"]):
    """The mean of the estimates whose advantages are returns plus those of a teacher, with one sequence as a step."""
    p, q = tree.logprobs(POLICY), tree.logprobs(teacher)
    advantages = with_teacher(rewards_to_go(token_rewards, tree.mask), q, p, weight)
    sequences, jacobian = torch.arange(len(tree.lengths)), torch.autograd.functional.jacobian(tree.logprobs, POLICY)
    mean = 0
    for s in range(len(sequences)):
        leaf = p[[s]].requires_grad_()
        batch = batch_of(tree, sequences[[s]], tree.logprobs(sampler)[[s]], advantages[[s]])
        loss = policy_loss(config, batch, PolicyOutput(leaf, torch.zeros(1, 1), None), p[[s]], p[[s]], None).loss
        by_logprob = torch.autograd.grad(loss, leaf)[0][0]
        mean = mean - tree.probabilities(sampler)[s] * torch.einsum("t,tij->ij", by_logprob, jacobian[s]).flatten()
    return mean


def kl_of_each_token(teacher, longest):
    """The gradient of sum_prefix P(prefix) KL(pi(.|prefix) || q(.|prefix)) with P held fixed, in plain numbers.

    d KL / d z_k = p_k (log p_k - log q_k - KL) at logits z.
    """
    p, q = (np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(axis=1, keepdims=True) for logits in (POLICY, teacher))
    prefixes = [prefix for length in range(longest) for prefix in product((0, 1), repeat=length)]
    found = np.zeros(p.shape)
    for row, prefix in enumerate(prefixes):
        reached = np.prod([p[prefixes.index(prefix[:t]), token] for t, token in enumerate(prefix)])
        gap = np.log(p[row]) - np.log(q[row])
        found[row] = reached * p[row] * (gap - p[row] @ gap)
    return torch.tensor(found.flatten())


def test_a_teachers_advantages_descend_the_reverse_kl_of_every_token():
    nothing = torch.zeros_like(TREE.token_rewards)
    mean = from_teacher(REFERENCE, nothing)
    assert same(mean, -kl_of_each_token(REFERENCE, LONGEST))
    assert mean.norm() > 0.1
    # One token has no later ones: it is the KL of the whole distribution, by autograd.
    p, q = (lambda logits: ONE_TOKEN.logprobs(logits).flatten()), ONE_TOKEN.logprobs(REFERENCE).flatten()
    whole = gradient_of(lambda logits: p(logits).exp() @ (p(logits) - q))
    assert same(from_teacher(REFERENCE, torch.zeros(3, 1), ONE_TOKEN), -whole)
    # Later tokens are left out on purpose: with them it would be the KL of whole sequences.
    sequences = gradient_of(
        lambda logits: TREE.probabilities(logits) @ (TREE.logprobs(logits) - TREE.logprobs(REFERENCE)).sum(dim=1)
    )
    assert not same(mean, -sequences)


def test_a_teacher_beside_the_reward_adds_its_gradient_by_its_weight():
    mean = from_teacher(REFERENCE, TREE.token_rewards, weight=0.3)
    assert same(mean, EXACT - 0.3 * kl_of_each_token(REFERENCE, LONGEST))


def test_a_teacher_equal_to_the_policy_gives_exactly_no_gradient():
    assert not from_teacher(POLICY, torch.zeros_like(TREE.token_rewards)).any()


def test_the_sampler_correction_removes_an_engines_difference_from_a_teachers_gradient():
    unbounded = SamplerCorrection("truncate", "sequence", 0.0, NO_BOUND)
    config = LossConfig("reinforce", sampler_correction=unbounded)
    nothing = torch.zeros_like(TREE.token_rewards)
    assert same(from_teacher(REFERENCE, nothing, sampler=OTHER, config=config), -kl_of_each_token(REFERENCE, LONGEST))
    off = LossConfig("reinforce", sampler_correction=SamplerCorrection("disabled"))
    assert not same(from_teacher(REFERENCE, nothing, sampler=OTHER, config=off), -kl_of_each_token(REFERENCE, LONGEST))


def test_the_entropy_bonus_has_its_closed_form_at_the_tempered_distribution():
    logits, nothing = POLICY.clone().requires_grad_(), torch.zeros(3, 1)
    logprobs = ONE_TOKEN.logprobs(logits / 0.7)
    known, entropy = logprobs.detach(), -(logprobs.exp() * logprobs).sum()
    batch = batch_of(ONE_TOKEN, torch.arange(3), known, nothing)
    policy_output = PolicyOutput(logprobs, entropy.expand(3, 1), None)
    policy_loss(LossConfig("reinforce", entropy_weight=0.3), batch, policy_output, known, known, None).loss.backward()
    # p = softmax(z / T): dH/dz_k = -p_k (log p_k + H) / T
    p = torch.softmax(POLICY[0] / 0.7, dim=0)
    assert same(logits.grad[0], 0.3 * p * (p.log() - p @ p.log()) / 0.7)
