import asyncio
import time
from typing import ClassVar

import pytest

from fuchsia_pl.engines.base import Engine, EngineSpec
from fuchsia_pl.envs import SingleTurnEnvironment
from fuchsia_pl.envs.items import read_rows
from fuchsia_pl.rollouts import calls
from fuchsia_pl.rollouts.addressing import derived_seed
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.rollouts.collector import Collector, Draw, EnvironmentStepError, PromptTooLongError
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.rollouts.metrics import over_ranks, reward_fractions
from fuchsia_pl.types import Completion, ConfigError, RolloutStatus
from tests.doubles import EOS, TinyEnvironment


class ScriptedEngine(Engine):
    """Sibling 0 answers "7" and stops, the others run into the length limit. Each id has the same logprob everywhere."""

    policy_version = 4
    logprobs: ClassVar[dict[int, float]] = {11: -0.5, EOS: -0.25, 12: -1.0, 13: -2.0, 14: -3.0}

    def __init__(self) -> None:
        self.requests = []

    def start(self, spec: EngineSpec) -> None: ...

    def close(self) -> None: ...

    async def load_weights(self, path, version) -> None: ...

    async def generate(self, prompt_ids, sampling):
        self.requests.append((list(prompt_ids), sampling))
        seeds = [derived_seed("run", 5, item, 0) for item in range(20)]
        if sampling.seed in seeds:
            return Completion((11, EOS), (-0.5, -0.25), "stop", None, self.policy_version)
        await asyncio.sleep(0.001)
        return Completion((12, 13, 14), (-1.0, -2.0, -3.0), "length", None, self.policy_version)

    async def score(self, token_ids):
        return tuple(self.logprobs.get(token, -4.0) for token in token_ids[1:])


def collect(tiny_model, max_length=40, environment=None):
    engine, environment = ScriptedEngine(), environment or TinyEnvironment()
    config = SamplingConfig(group_size=3, temperature=0.7, max_completion_tokens=3, max_length=max_length)
    collector = Collector(engine, environment, Chat(tiny_model), config)
    draw = Draw(environment.train_items(), [4, 11], siblings=3, temperature=0.7, address=("run", 5))
    return asyncio.run(collector.collect(draw)), engine, collector


def test_the_sampled_ids_are_kept(tiny_model):
    groups, engine, collector = collect(tiny_model)
    prompt_ids = collector.chat.render([{"role": "user", "content": "11?"}])
    rollout = groups[1][0]
    assert rollout.token_ids == [*prompt_ids, 11, EOS]
    assert rollout.loss_mask == [False] * len(prompt_ids) + [True, True]
    assert rollout.sampling_logprobs == [0.0] * len(prompt_ids) + [-0.5, -0.25]
    assert rollout.completion == "7"
    assert (rollout.item, rollout.item_index, rollout.policy_version) == ({"n": 11}, 11, 4)
    assert [[r.status for r in group] for group in groups] == [
        [RolloutStatus.COMPLETED, RolloutStatus.TRUNCATED, RolloutStatus.TRUNCATED]
    ] * 2
    assert engine.requests[3][0] == prompt_ids


def test_every_request_has_its_own_seed_and_the_configured_sampling(tiny_model):
    _, engine, _ = collect(tiny_model)
    samplings = [sampling for _, sampling in engine.requests]
    expected = [derived_seed("run", 5, item, sibling) for item in (4, 11) for sibling in range(3)]
    assert [sampling.seed for sampling in samplings] == expected
    assert {(s.temperature, s.max_tokens, s.stop, s.stop_token_ids) for s in samplings} == {(0.7, 3, (), (EOS,))}


def test_a_prompt_without_room_for_its_completion_is_an_error(tiny_model):
    # "user:4?\n" and "a:" are 10 characters, one token each; 12 - 3 leaves 9
    with pytest.raises(PromptTooLongError, match=r"prompt of item 4 has 10 tokens.*max_length=12 leaves 9"):
        collect(tiny_model, max_length=12)


def test_the_environments_stop_strings_reach_every_request(tiny_model):
    environment = TinyEnvironment()
    environment.stop = ["</answer>"]
    _, engine, _ = collect(tiny_model, environment=environment)
    assert {sampling.stop for _, sampling in engine.requests} == {("</answer>",)}


class Stepping(TinyEnvironment):
    """An environment with a given `step_rollout`."""

    def __init__(self, step) -> None:
        super().__init__()
        self.step, self.timeout_s = step, 0.2

    def step_rollout(self, rollout):
        return self.step(rollout)


def broken(rollout):
    raise KeyError("tool")


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (broken, "Stepping.step_rollout on item 4 raised KeyError: 'tool'"),
        (lambda rollout: time.sleep(1), "on item 4 took longer than 0.2 s"),
        (lambda rollout: None, r"on item 4 called neither rollout\.respond\(text\) nor rollout\.finish\(\)"),
    ],
)
def test_a_step_that_fails_hangs_or_never_ends_is_an_error_with_its_item(tiny_model, step, words):
    with pytest.raises(EnvironmentStepError, match=words):
        collect(tiny_model, environment=Stepping(step))


def test_an_async_step_is_awaited(tiny_model):
    async def step(rollout):
        await asyncio.sleep(0.01)
        rollout.finish()

    groups, *_ = collect(tiny_model, environment=Stepping(step))
    assert groups[0][0].status is RolloutStatus.COMPLETED


def test_metrics_by_hand(tiny_model):
    groups, _, collector = collect(tiny_model)
    # Per group: completions (11, 2), (12, 13, 14), (12, 13, 14); even ids 1/2, 2/3, 2/3; ended 1, 0, 0 with weight 0.5
    rollouts = [rollout for group in groups for rollout in group]
    metrics = over_ranks(reward_fractions(rollouts, collector.environment, world_size=1), add_up=lambda values: values)
    assert metrics["reward/even"] == pytest.approx((1 / 2 + 2 / 3 + 2 / 3) / 3)
    assert metrics["reward/ended"] == pytest.approx(1 / 3)
    assert metrics["reward/mean"] == pytest.approx((1 / 2 + 2 / 3 + 2 / 3) / 3 + 0.5 / 3)
    assert metrics["rollout/completion_tokens"] == pytest.approx(8 / 3)
    assert metrics["rollout/truncated_fraction"] == pytest.approx(2 / 3)
    assert metrics["rollout/accuracy"] == 0.0


def test_base_exceptions_of_an_environments_methods_are_named(tiny_model):
    class Leaving(Stepping):
        async def prepare(self):
            raise SystemExit(0)

    def leave(rollout):
        raise SystemExit(0)

    with pytest.raises(EnvironmentStepError, match=r"Stepping\.step_rollout on item 4 raised SystemExit: 0"):
        collect(tiny_model, environment=Stepping(leave))
    with pytest.raises(EnvironmentStepError, match=r"Leaving\.prepare raised SystemExit: 0"):
        collect(tiny_model, environment=Leaving(leave))


class Given(TinyEnvironment):
    """An environment with given items as prompts."""

    def __init__(self, items) -> None:
        super().__init__()
        self.items = items

    def train_items(self):
        return self.items

    def messages(self, item):
        return SingleTurnEnvironment.messages(self, item)


def test_an_item_without_a_prompt_is_named_by_its_row_and_field(tmp_path, tiny_model):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a"}\n\n{"prompt": null}\n')
    collector = Collector(ScriptedEngine(), Given([]), Chat(tiny_model), SamplingConfig(max_completion_tokens=3))
    words = r"^held-out item 1 \(\S+rows\.jsonl, line 3\): field 'prompt' is null: a prompt is a text or a list"
    with pytest.raises(ConfigError, match=words):
        collector.fitting(read_rows(str(file), "train", {}), "held-out")
    for items, problem in [
        ([{"prompt": "a"}, {"q": "a"}], r"the item has no field 'prompt', it has \['q'\]"),
        ([{"prompt": "a"}, "b"], "it is a text, but an item must be a mapping"),
        ([{"prompt": "a"}, {"prompt": [{"role": "user", "content": ""}]}], "field 'prompt', message 0"),
    ]:
        with pytest.raises(ConfigError, match=f"^training item 1: {problem}"):
            collector.fitting(items, "training")


def test_siblings_have_messages_of_their_own_made_once(tiny_model):
    made = []

    class Counting(TinyEnvironment):
        def messages(self, item):
            made.append(item["n"])
            return super().messages(item)

    groups, *_ = collect(tiny_model, environment=Counting())
    assert made == [4, 11]
    assert [r.messages[0] for r in groups[0]] == [{"role": "user", "content": "4?"}] * 3
    assert groups[0][0].messages[0] is not groups[0][1].messages[0]


def test_a_prepare_that_hangs_is_ended_with_its_place():
    class Hanging(TinyEnvironment):
        prepare_timeout_s = 0.05

        async def prepare(self):
            await asyncio.Event().wait()

    with pytest.raises(
        EnvironmentStepError, match=r"^Hanging\.prepare took longer than 0\.05 s \(prepare_timeout_s\)$"
    ):
        asyncio.run(calls.prepare(Hanging()))
    assert TinyEnvironment().prepare_timeout_s == 1800.0
