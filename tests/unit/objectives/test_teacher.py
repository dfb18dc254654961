import pytest
import torch

from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.objectives.teacher import teacher_advantages, with_teacher
from fuchsia_pl.types import ConfigError

TEACHER, POLICY = torch.tensor([[-0.1, -3.0]]), torch.tensor([[-0.6, -1.0]])


def test_the_advantage_is_how_much_more_probable_the_teacher_finds_a_token():
    # -0.1 + 0.6 = 0.5 and -3 + 1 = -2
    found = teacher_advantages(TEACHER, POLICY)
    torch.testing.assert_close(found, torch.tensor([[0.5, -2.0]], dtype=torch.float64))
    assert found.dtype is torch.float64
    assert not teacher_advantages(POLICY, POLICY).any()


def test_it_is_added_to_that_of_the_rewards_by_its_weight():
    # 1 + 4 * 0.5 = 3 and -1 + 4 * -2 = -9
    found = with_teacher(torch.tensor([[1.0, -1.0]], dtype=torch.float64), TEACHER, POLICY, weight=4.0)
    torch.testing.assert_close(found, torch.tensor([[3.0, -9.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kl_in": "reward", "beta": 0.1}, r"so model.loss.kl_in: reward \(set \"loss\"\) has no effect"),
        ({"truncated": "penalise"}, r"so model.loss.truncated: penalise \(set \"keep\" or \"mask\"\) has no effect"),
        ({"max_refills": 2}, 'with advantage "teacher": set it to 0'),
        ({"reward_aggregation": "normalize_then_sum"}, 'needs advantage "group_norm", got "teacher"'),
    ],
)
def test_a_teacher_alone_refuses_settings_of_the_reward(settings, words):
    with pytest.raises(ConfigError, match=words):
        LossConfig(advantage="teacher", **settings)
    assert LossConfig(advantage="teacher", beta=0.1).kl_in_loss
