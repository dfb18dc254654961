"""Credit from a teacher: on-policy distillation.

The policy pi samples, and a teacher q scores the same tokens. With prefixes x_<t of the policy, held fixed, the objective is the
reverse KL of every token's distribution, sum_t KL(pi(.|x_<t) || q(.|x_<t)). Its gradient is

    E[sum_t (log pi(x_t|x_<t) - log q(x_t|x_<t)) grad log pi(x_t|x_<t)]

because the remaining term E[grad log pi] is 0. So log q - log pi is an advantage, and a policy gradient with it descends the KL.
A token gets no credit for later ones (a discount of 0), so prefixes are not chosen for the teacher's sake.
Source: K. Lu, "On-Policy Distillation", Thinking Machines Lab (2025); for whole sequences MiniLLM, arXiv:2306.08543, section 2.

log pi is the trainer's before the first update. With those of the sampler, a teacher equal to the policy would give the
difference between the two engines as an advantage. Both distributions have the sampling temperature.

Shape letters: R rollouts, T sampled tokens of the longest one.
"""

from torch import Tensor


def teacher_advantages(teacher_logprobs: Tensor, policy_logprobs: Tensor) -> Tensor:
    """The difference log q - log pi of each sampled token: above 0 where the teacher gives it a higher probability.

    Args:
        teacher_logprobs: [R, T].
        policy_logprobs: [R, T], before the first update, without gradient.

    Returns:
        float64 [R, T].

    >>> import torch
    >>> teacher_advantages(torch.tensor([[-0.5, -2.0]]), torch.tensor([[-1.0, -1.0]])).tolist()
    [[0.5, -1.0]]
    """
    return teacher_logprobs.double() - policy_logprobs.double()


def with_teacher(advantages: Tensor, teacher_logprobs: Tensor, policy_logprobs: Tensor, weight: float) -> Tensor:
    """Advantages of the rewards plus `weight` times those of the teacher.

    Args:
        advantages: float64 [R, T], all 0 with `advantage: teacher`.
        teacher_logprobs: [R, T].
        policy_logprobs: [R, T].
        weight: Above 0.

    Returns:
        float64 [R, T].

    >>> import torch
    >>> with_teacher(torch.tensor([[1.0]]), torch.tensor([[-0.5]]), torch.tensor([[-1.0]]), weight=0.5).tolist()
    [[1.25]]
    """
    return advantages + weight * teacher_advantages(teacher_logprobs, policy_logprobs)
