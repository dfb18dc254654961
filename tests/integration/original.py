"""An environment in the form of the original Fuchsia."""

from fuchsia_pl.envs import MultiTurnEnvironment, Rollout


def score(completion, item):
    return len(set(completion)) / 100 + (item["word"] in completion)


def custom_reward_function(rollouts: list[Rollout], *args, **kwargs) -> list[float]:
    return [score(r.completion, r.item) for r in rollouts]


class CustomEnvironment(MultiTurnEnvironment):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.max_steps = 4
        self.stop = ["</tool_call>", "."]
        self.reward_functions = [custom_reward_function]

    def step_rollout(self, rollout: Rollout):
        if len(rollout.turns) < 3:
            rollout.respond("<tool_response>Say more.</tool_response>")
        else:
            rollout.finish()
