"""What is wrong with a training run, from the metrics of its steps.

Every rule compares medians over windows of optimizer steps with an absolute limit, and where a level is normal in some runs, with
the start of the run. `now` is the newest window, `before` the window before it, `start` the first window of the run.

| name | rule |
|---|---|
| `no_spread` | in the newest half window, on average at least 95 % of the groups have equal rewards |
| `reward_flat` | after `flat_steps`, the reward of now exceeds the start by at most half its noise per step; accuracy below 0.9 |
| `kl_growing` | KL per token now above 1.5, and 1.5 times that before |
| `gap_growing` | logprob gap now above 0.1 (times 1 + staleness), and twice that of the start |
| `entropy_collapsed` | entropy now below 0.05, and below a fifth of the start; accuracy below 0.9 |
| `all_truncated` | in the newest half window, on average at least 98 % of the rollouts are truncated |
| `lengths_exploding` | completions now twice as long as at the start; at least 25 % truncated, 15 points more than at the start |
| `reward_dominates` | one reward has at least 95 % of the spread within groups, while another varies in half of the groups |
| `clip_fraction_high` | clip fraction now above 0.3 |
| `staleness_high` | tokens now more than 4 steps old, or more than 10 % of the rows dropped as too old |
| `learning_rate` | initial rate of an Adam for LoRA below 1e-6 or above 1e-2: ten times outside of the usual range |
"""

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from fuchsia_pl.evaluation.history import (
    ACCURACY,
    CLIPPED,
    ENTROPY,
    EQUAL_GROUPS,
    GAP,
    KL,
    LENGTH,
    REWARD,
    SPREAD,
    STALE_ROWS,
    STALENESS,
    TRUNCATED,
    VARYING,
    History,
)

USUAL_RATES = (1e-5, 1e-3)  # of Adam for LoRA
FAR_RATES = (1e-6, 1e-2)  # ten times outside of them
LEARNED = 0.9  # accuracy from which low entropy or a flat reward is a sign of success
NORMAL = 1.4826  # a normal distribution's standard deviation / its median absolute deviation


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a run.

    Attributes:
        name: Name of the rule.
        metric: The metric that shows it.
        text: What is wrong, with numbers.
        advice: What to try.
        level: How bad it is: 0 if there are no degrees. A finding is clearly worse at twice the level.

    >>> Finding("kl_growing", "train/kl", "train/kl is 1.2 per token", "Lower the learning rate", level=1.2).is_worse_than(0.5)
    True
    """

    name: str
    metric: str
    text: str
    advice: str
    level: float = 0.0

    def is_worse_than(self, level: float) -> bool:
        """Whether it is clearly worse than at an earlier level."""
        return self.level > 0.0 and self.level >= 2.0 * level


def find_illnesses(history: History) -> list[Finding]:
    """All findings after the newest step, in the order of the table above.

    >>> find_illnesses(History(window=10, flat_steps=100))
    []
    """
    return [finding for detect in DETECTORS if (finding := detect(history)) is not None]


def learning_rate(rate: float, optimizer: str) -> Finding | None:
    """The learning rate, if it is far from what trains a LoRA adapter. The usual rates are those of Adam and its relatives.

    Args:
        rate: Highest initial rate of the optimizer, before the schedule.
        optimizer: Name of its class.

    >>> learning_rate(1e-4, "AdamW") is None, learning_rate(0.5, "SGD") is None
    (True, True)
    >>> learning_rate(2e-7, "AdamW").text
    'the learning rate is 2e-07, and an adapter hardly learns below 1e-06'
    """
    low, high = FAR_RATES
    if "adam" not in optimizer.lower() or low <= rate <= high:
        return None
    what = f"an adapter hardly learns below {low:g}" if rate < low else f"an adapter diverges above {high:g}"
    return Finding(
        "learning_rate",
        "train/grad_norm" if rate > high else REWARD,
        f"the learning rate is {rate:g}, and {what}",
        f"Usual rates of LoRA are {USUAL_RATES[0]:g} to {USUAL_RATES[1]:g} (model.optimizer.init_args.lr)",
    )


def _no_spread(history: History) -> Finding | None:
    shares = history.newest(EQUAL_GROUPS, _short(history))
    if not shares or statistics.fmean(shares) < 0.95:
        return None
    reward = history.newest(REWARD, _short(history))
    level = f", {statistics.fmean(reward):.3g} on average" if reward else ""
    return Finding(
        "no_spread",
        "rollout/zero_variance_groups",
        f"in {statistics.fmean(shares):.0%} of the groups of the last {_short(history)} steps all siblings have the same "
        f"reward{level}: they have no advantage, and nothing is learned from them",
        "If that is the highest reward, the task is learned. Else give items of medium difficulty, partial credit, a larger "
        "data.sampling.group_size or a higher data.sampling.temperature; `fuchsia check-env` plays answers against the rewards",
    )


def _reward_flat(history: History) -> Finding | None:
    values = history.newest(REWARD, history.flat_steps)
    start, now = history.at_start(REWARD), history.now(REWARD)
    if start is None or now is None or len(values) < 2 or _has_learned(history):
        return None
    steps = [after - before for before, after in itertools.pairwise(values)]
    noise = NORMAL * statistics.median(abs(step) for step in steps) / 2**0.5
    # The difference of two medians over 10 steps has a standard error of 0.56 times the noise of a step.
    if now - start > max(0.5 * noise, 1e-3 * abs(start)):
        return None
    return Finding(
        "reward_flat",
        REWARD,
        f"{REWARD} is {now:.3g} after {history.num_steps} steps and was {start:.3g} at the start; it varies by {noise:.2g} from "
        "step to step",
        "Look at the best and the worst rollouts of a group in rollouts.jsonl. Try a higher learning rate "
        "(model.optimizer.init_args.lr), a larger data.sampling.group_size or data.batch_size, or easier items",
        level=float(history.num_steps),
    )


def _kl_growing(history: History) -> Finding | None:
    now, before = history.now(KL), history.before(KL)
    if now is None or before is None or now <= 1.5 or now < 1.5 * before:
        return None
    return Finding(
        "kl_growing",
        KL,
        f"{KL} is {now:.3g} per token in the last {history.window} steps and was {before:.3g} in the {history.window} before: "
        "the policy moves away from its reference",
        "Try a lower learning rate (model.optimizer.init_args.lr) or a higher model.loss.beta, and read completions: the policy "
        "may exploit a reward",
        level=now,
    )


def _gap_growing(history: History) -> Finding | None:
    now, start = history.now(GAP), history.at_start(GAP)
    allowed = 0.1 * (1.0 + (history.now(STALENESS) or 0.0))  # rollouts of older weights differ more
    if now is None or start is None or now <= allowed or now < 2.0 * start:
        return None
    return Finding(
        "gap_growing",
        GAP,
        f"{GAP} is {now:.3g} in the last {history.window} steps and was {start:.3g} at the start: the engine samples from "
        "another distribution than the one that is trained",
        "Compute both in one precision (model.policy.dtype, trainer.precision; --config overlays/float32.yaml rules it out), "
        "lower the learning rate, or set model.loss.sampler_correction",
        level=now,
    )


def _entropy_collapsed(history: History) -> Finding | None:
    now, start = history.now(ENTROPY), history.at_start(ENTROPY)
    if now is None or start is None or now >= 0.05 or now >= 0.2 * start or _has_learned(history):
        return None
    return Finding(
        "entropy_collapsed",
        ENTROPY,
        f"{ENTROPY} is {now:.2g} per token in the last {history.window} steps and was {start:.2g} at the start: siblings are "
        "almost the same, and nothing new is tried",
        "Try a lower learning rate, a higher model.loss.clip_high (algorithms/dapo.yaml), model.loss.entropy_weight, or a higher "
        "data.sampling.temperature",
    )


def _all_truncated(history: History) -> Finding | None:
    shares = history.newest(TRUNCATED, _short(history))
    if not shares or statistics.fmean(shares) < 0.98:
        return None
    return Finding(
        "all_truncated",
        TRUNCATED,
        f"{statistics.fmean(shares):.0%} of the rollouts of the last {_short(history)} steps ran out of tokens or turns, before "
        "they ended by themselves",
        "Raise data.sampling.max_completion_tokens and max_length (or the environment's max_steps), ask for short answers in the "
        "prompt, and see whether the model ends its turns (chat template, end-of-turn token)",
    )


def _lengths_exploding(history: History) -> Finding | None:
    now, start = history.now(LENGTH), history.at_start(LENGTH)
    truncated, at_start = history.now(TRUNCATED), history.at_start(TRUNCATED)
    if now is None or start is None or truncated is None or at_start is None:
        return None
    if now < 2.0 * start or truncated < max(0.25, at_start + 0.15):
        return None
    return Finding(
        "lengths_exploding",
        LENGTH,
        f"{LENGTH} is {now:.4g} in the last {history.window} steps and was {start:.4g} at the start; {truncated:.0%} of the "
        "rollouts are truncated",
        "See whether a reward pays for length. Try model.loss.truncated: penalise (algorithms/dapo.yaml), a reduction without "
        "bias to length (algorithms/dr_grpo.yaml), or a higher data.sampling.max_completion_tokens if the length is of use",
        level=now,
    )


def _reward_dominates(history: History) -> Finding | None:
    shares = {name: history.now(SPREAD + name) or 0.0 for name in history.names(SPREAD)}
    first = max(shares, key=shares.__getitem__, default=None)
    if first is None or shares[first] < 0.95:
        return None
    others = [name for name in shares if name != first and (history.now(VARYING + name) or 0.0) >= 0.5]
    if not others:
        return None
    return Finding(
        "reward_dominates",
        f"reward/{first}",
        f"the reward {first} makes {shares[first]:.0%} of the differences between siblings; {', '.join(others)} varies too, and "
        "has hardly an effect",
        "Bring the rewards to one scale by the environment's reward_weights, or set model.loss.reward_aggregation: "
        "normalize_then_sum",
    )


def _clip_fraction_high(history: History) -> Finding | None:
    now = history.now(CLIPPED)
    if now is None or now <= 0.3:
        return None
    return Finding(
        "clip_fraction_high",
        CLIPPED,
        f"{CLIPPED} is {now:.2f} in the last {history.window} steps: the updates of a phase move the policy so far that many "
        "tokens no longer count",
        "Try fewer model.loss.mini_batches or num_policy_updates, a lower learning rate, or wider bounds "
        "(model.loss.clip_low, clip_high)",
        level=now,
    )


def _staleness_high(history: History) -> Finding | None:
    age, dropped = history.now(STALENESS), history.now(STALE_ROWS) or 0.0
    if age is None or (age <= 4.0 and dropped <= 0.1):
        return None
    is_dropped = dropped > 0.1
    return Finding(
        "staleness_high",
        "rollout/stale" if is_dropped else STALENESS,
        f"{dropped:.0%} of the rows of the last {history.window} steps were too old and dropped"
        if is_dropped
        else f"the tokens of the last {history.window} steps were sampled by weights that are {age:.1f} steps old on average",
        "Try a lower data.sampling.max_staleness, more generation (servers, data.engine.init_args.max_num_seqs), or shorter "
        "completions; data.sampling.in_flight: continue mixes newer weights into long rollouts",
        level=dropped if is_dropped else age,
    )


def _has_learned(history: History) -> bool:
    return (history.now(ACCURACY) or 0.0) >= LEARNED


def _short(history: History) -> int:
    """Steps that show what is the case in every group or rollout."""
    return max(3, history.window // 2)


DETECTORS: tuple[Callable[[History], Finding | None], ...] = (
    _no_spread,
    _reward_flat,
    _kl_growing,
    _gap_growing,
    _entropy_collapsed,
    _all_truncated,
    _lengths_exploding,
    _reward_dominates,
    _clip_fraction_high,
    _staleness_high,
)
NAMES = (*(detect.__name__.removeprefix("_") for detect in DETECTORS), "learning_rate")
