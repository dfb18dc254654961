import torch

from fuchsia_pl.rollouts.staleness import drop_stale, oldest_version
from tests.doubles import make_sample


def sample_of(version: int):
    sample = make_sample([1], [5], advantage=1.0)
    turn = sample.rollout.turns[0]
    sample.rollout.turns[0] = type(turn)(type(turn.completion)((5,), (-1.0,), "stop", None, version), "", "", "", "")
    return sample


def test_rows_are_dropped_where_some_may_be_old_and_these_are_older():
    samples = [sample_of(version) for version in (3, 5, 7)]
    assert [s.rollout.policy_version for s in drop_stale(samples, step=7, max_staleness=2)] == [5, 7]
    assert drop_stale(samples, step=7, max_staleness=0) == samples


def test_all_ranks_have_the_oldest_version_of_any():
    """Another rank's rows are of version 4, its rollouts of 2; this one has none left, or some of 6."""
    other = torch.tensor([4, 2])

    def lowest(versions):
        return torch.minimum(versions, other)

    assert oldest_version([sample_of(6)], of_rollouts=5, lowest=lowest) == 4
    assert oldest_version([], of_rollouts=1, lowest=lowest) == 4
