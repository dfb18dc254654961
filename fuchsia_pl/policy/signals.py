"""What the policy computes of rollouts before there are advantages."""

from fuchsia_pl.batch import Batch, TrainerSignals
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.objectives.kl import kl_estimate
from fuchsia_pl.policy.policy import Policy


def trainer_signals(policy: Policy, loss: LossConfig, batch: Batch) -> TrainerSignals:
    """Logprobs of the policy, critic values if there is a critic, and the KL where the reward contains it; without dropout.

    Args:
        policy: The policy before the update.
        loss: The objective.
        batch: A micro-batch of all rows, also of those that will not be trained on.
    """
    output = policy.evaluated_output(batch)
    if not loss.kl_in_reward:
        return TrainerSignals(None, output.values, output.logprobs)
    reference = policy.reference_logprobs(batch)
    kl = kl_estimate(loss.parts.kl_estimator, output.logprobs, reference, output.logprobs)
    return TrainerSignals(kl, output.values, output.logprobs)
