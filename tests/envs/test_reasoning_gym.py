"""ReasoningGym with the real library. Known good and bad datasets of reasoning-gym 0.1.25 are named here, not in the code."""

import asyncio
import importlib.util
import logging
from collections import Counter

import pytest
import yaml

from fuchsia_pl.cli import FuchsiaCLI
from fuchsia_pl.envs import ConfigError, Difficulty
from fuchsia_pl.envs.limited import WorkerDied
from fuchsia_pl.library.reasoning_gym import ReasoningGym, Task
from fuchsia_pl.library.reasoning_gym.entries import QuestionChanged, seed_of
from fuchsia_pl.library.reasoning_gym.environment import unseen
from fuchsia_pl.rollouts.scoring import score_group
from tests.doubles import TINY, said

reasoning_gym = pytest.importorskip("reasoning_gym")
SUMS = Task("chain_sum", config={"max_terms": 3})
LEGS = Task("leg_counting", weight=3.0)


@pytest.fixture(scope="module")
def gym():
    environment = ReasoningGym([SUMS, LEGS], num_items=40, num_validation=12)
    yield environment
    asyncio.run(environment.close())


def made(*tasks: Task, **settings) -> ReasoningGym:
    return ReasoningGym(list(tasks), **{"num_items": 4, "num_validation": 2, **settings})


def closed(environment: ReasoningGym, *splits: str):
    """The items of some splits, after which the processes end."""
    try:
        return [getattr(environment, f"{split}_items")() for split in splits or ("train", "validation")]
    finally:
        asyncio.run(environment.close())


def scored(environment: ReasoningGym, item, *texts: str):
    rollouts = [said(text, item) for text in texts]
    asyncio.run(score_group(environment, rollouts))
    return rollouts


def test_items_are_entries_of_the_real_datasets(gym):
    for item in (*gym.train_items()[:6], *gym.validation_items()[:6]):
        config = {"chain_sum": {"max_terms": 3}, "leg_counting": {}}[item["task"]]
        entry = reasoning_gym.create_dataset(item["task"], seed=item["index"], size=1, **config)[0]
        assert item == {
            "task": item["task"],
            "index": item["index"],
            "question": entry["question"],
            "answer": entry["answer"],
        }
        assert gym.messages(item)[1] == {"role": "user", "content": entry["question"]}


def test_weights_decide_the_numbers_of_items_and_the_first_ones_are_mixed(gym):
    tasks = [item["task"] for item in gym.train_items()]
    assert Counter(tasks) == {"leg_counting": 30, "chain_sum": 10}
    assert Counter(tasks[:8]) == {"leg_counting": 6, "chain_sum": 2}
    assert Counter(item["task"] for item in gym.validation_items()) == {"leg_counting": 9, "chain_sum": 3}


def test_no_entry_of_the_training_split_is_an_entry_of_the_held_out_split():
    """The ranges of seeds, with the largest settings: training below 2^30, held out from there to 2^31 - 1."""
    for seed in (0, 1, 1023):
        for index in (0, 2**20 - 1):
            assert 0 <= seed_of(seed, index) < 2**30
            assert 2**30 <= seed_of(seed, 2**30 + index) < 2**31
            assert 2**31 <= seed_of(seed, 2**31 + index) < 2**32  # worked examples; numpy takes no larger seed
    with pytest.raises(ConfigError, match="seed from 0 to 1023, got 1024"):
        made(SUMS, seed=1024)
    with pytest.raises(ConfigError, match="num_items from 1 to 1048576, got 1048577"):
        made(SUMS, num_items=2**20 + 1)


def test_items_repeat_and_depend_on_the_seed_and_on_their_index_alone(gym):
    (again,) = closed(ReasoningGym([LEGS, SUMS], num_items=40, num_validation=12), "train")
    assert again == gym.train_items()
    (fewer,) = closed(made(SUMS), "train")
    assert fewer == [item for item in gym.train_items() if item["task"] == "chain_sum"][:4]
    (other,) = closed(made(SUMS, seed=1), "train")
    assert not {item["question"] for item in other} & {item["question"] for item in fewer}


def test_held_out_questions_that_repeat_are_left_out_and_counted(caplog):
    """Sums of two digits from 0 to 9: 200 different questions, some of which are in both splits."""
    easy = Task("chain_sum", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    with caplog.at_level(logging.WARNING):
        train, held_out = closed(made(easy, num_items=150, num_validation=60))
    questions = [item["question"] for item in held_out]
    assert 0 < len(questions) < 60
    assert len(set(questions)) == len(questions)
    assert not {item["question"] for item in train} & set(questions)
    assert f"{{'chain_sum': {60 - len(questions)}}}" in caplog.text


def test_a_task_without_a_held_out_question_of_its_own_is_refused():
    train = [{"task": "a", "question": "1?"}, {"task": "b", "question": "2?"}]
    held_out = [{"task": "a", "question": "1?"}, {"task": "b", "question": "1?"}]
    with pytest.raises(ConfigError, match=r"all held-out questions of \['a'\] are also training questions"):
        unseen(held_out, train)
    assert unseen(held_out[1:], train) == held_out[1:]


def test_the_score_is_that_of_the_dataset_and_thinking_is_no_answer(gym):
    item = next(item for item in gym.train_items() if item["task"] == "chain_sum")
    gold, wrong = item["answer"], str(int(item["answer"]) + 1)
    texts = {
        f"<answer>{gold}</answer>": 1.0,
        f"<answer>{wrong}</answer> no, <answer> {gold}.0 </answer>": 1.0,
        f"<answer>{wrong}</answer>": 0.0,
        gold: 0.0,  # without the marks
        f"<think><answer>{gold}</answer></think>": 0.0,
        f"<think>{wrong}</think><answer>{gold}</answer>": 1.0,
        "": 0.0,
    }
    rollouts = scored(gym, item, *texts)
    assert [rollout.rewards["score"] for rollout in rollouts] == list(texts.values())
    assert [rollout.reward for rollout in rollouts] == list(texts.values())  # accuracies have no weight
    assert [gym.is_correct(rollout) for rollout in rollouts] == [value == 1.0 for value in texts.values()]
    assert not any(rollout.counts for rollout in rollouts)
    assert gym.answer(rollouts[0]) == gold
    (part,) = scored(gym, item, f"<answer>{gold} {'x' * len(gold)}</answer>")
    # `compute_decimal_reward` pays the share of the text that is the gold answer: n of 2 n + 1 characters
    assert part.rewards["score"] == len(gold) / (2 * len(gold) + 1)


def test_each_task_has_an_accuracy_of_its_own(gym):
    sums, legs = (next(i for i in gym.train_items() if i["task"] == name) for name in ("chain_sum", "leg_counting"))
    right, wrong = scored(gym, sums, f"<answer>{sums['answer']}</answer>", "<answer>0.5</answer>")
    assert (right.rewards["accuracy_chain_sum"], wrong.rewards["accuracy_chain_sum"]) == (1.0, 0.0)
    assert right.rewards["accuracy_leg_counting"] is None
    (other,) = scored(gym, legs, f"<answer>{legs['answer']}</answer>")
    assert (other.rewards["accuracy_leg_counting"], other.rewards["accuracy_chain_sum"]) == (1.0, None)
    assert [function.__name__ for function in made(SUMS).reward_functions] == ["score"]


def test_the_gold_turn_of_every_item_scores_1(gym):
    for item in (*gym.train_items()[:8], *gym.validation_items()[:4]):
        (rollout,) = scored(gym, item, *gym.gold_turns(item))
        assert rollout.reward == 1.0


def test_an_answer_that_crashes_or_hangs_the_dataset_scores_0_and_is_counted():
    """`string_insertion` evaluates the answer as code: here the code spins, ends the process, or nests too deeply."""
    environment = made(Task("string_insertion"), num_items=1, num_validation=1, score_timeout_s=0.3)
    item = environment.train_items()[0]
    codes = {
        "[[1 for _ in iter(int, 1)], 2]": "score_timeout",
        "__import__('os')._exit(0)": "score_error",
        "__import__('os').kill(__import__('os').getpid(), 9)": "score_error",
    }
    rollouts = scored(environment, item, *(f"<answer>{code}</answer>" for code in codes))
    assert [rollout.reward for rollout in rollouts] == [0.0] * len(codes)
    assert [dict(rollout.counts) for rollout in rollouts] == [{name: 1} for name in codes.values()]
    assert set(codes.values()) == set(environment.counter_names())
    (gold,) = scored(environment, item, *environment.gold_turns(item))
    assert gold.reward == 1.0  # the next answer is scored
    asyncio.run(environment.close())


def test_an_entry_with_another_question_stops_the_run(gym):
    item = {**gym.train_items()[0], "question": "another?"}
    with pytest.raises(QuestionChanged, match="made another question for entry 0"):
        gym._entries.score(item, "1")


def test_a_reply_that_depends_on_the_answer_is_an_error_of_the_answer(gym, monkeypatch):
    item = gym.train_items()[0]

    def forged(reply, request, timeout_s):
        return {"same": True, "score": None} if request["answer"] is None else reply

    for reply in ({"same": False, "score": 1.0}, [], {"same": True, "score": "1"}, {"same": True, "score": 10**400}):
        monkeypatch.setattr(gym._entries.workers, "call", lambda *request, reply=reply: forged(reply, *request))
        with pytest.raises(WorkerDied):
            gym._entries.score(item, "1")


@pytest.mark.parametrize(
    ("tasks", "text"),
    [
        ([Task("chain_sums")], r"has no dataset of this name: similar names are \['chain_sum'"),
        ([Task("xyzxyz")], r"has no dataset of this name: the names are ab, "),
        (
            [Task("chain_sum", config={"max_term": 3})],
            r"keys \['max_term'\]: allowed are \['allow_negation', 'max_digits'",
        ),
        ([Task("chain_sum", config={"max_terms": 0})], "refuses its config .*AssertionError: max_terms must be"),
        ([Task("composite")], "reasoning-gym"),
        ([Task("chain_sum", levels=12)], "'chain_sum': it has 11 levels, got levels=12"),
        (
            [Task("letter_counting", levels=8)],
            "'letter_counting': it has 7 levels, got levels=8",
        ),  # the last two are the same
        ([Task("acre", levels=1)], "no levels for this dataset"),
        ([Task("chain_sum", config={"max_terms": 3}, levels=2)], r"its levels set \['max_terms'\]"),
        ([Task("knight_swap", levels=1)], "refuses its config {} at level 0: AssertionError"),
        (
            [SUMS, Task("leg_counting", weight=0.001)],
            r"the weights of \['leg_counting'\] give them none of 4 train items",
        ),
    ],
)
def test_tasks_that_the_library_does_not_have_are_refused_before_an_engine_starts(tasks, text):
    with pytest.raises(ConfigError, match=text) as caught:
        closed(made(*tasks))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tasks", "settings", "text"),
    [
        ([], {}, r"one task or more, each name once, got \[\]"),
        ([SUMS, SUMS], {}, "each name once, got"),
        ([Task("chain_sum", weight=0.0)], {}, "weight of task 'chain_sum' must be above 0, got 0.0"),
        ([Task("chain_sum", levels=0)], {}, "levels of task 'chain_sum' must be 1 or more, or null, got 0"),
        ([Task("chain_sum", weight=float("inf"))], {}, "must be above 0, got inf"),
        ([Task("chain_sum", config={"seed": 1, "size": 2})], {}, r"sets \['seed', 'size'\]"),
        ([Task("chain_sum", config={"max_terms": {1}})], {}, "must be like JSON"),
        ([SUMS], {"num_validation": 0}, "num_validation from 1 to 1048576, got 0"),
        ([SUMS], {"num_examples": 65}, "num_examples from 0 to 64, got 65"),
        ([SUMS], {"score_timeout_s": 0.0}, "score_timeout_s above 0, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(tasks, settings, text):
    with pytest.raises(ConfigError, match=text):
        made(*tasks, **settings)


def test_without_the_library_one_line_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'fuchsia-pl\[worlds\]'"):
        made(SUMS)


def test_the_system_prompt_is_a_setting():
    assert made(SUMS, system_prompt="Be brief.").messages({"question": "1?"}) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1?"},
    ]


def test_worked_examples_are_entries_of_the_same_task_and_of_no_split():
    gym = made(SUMS, LEGS, num_examples=2)
    plain = made(SUMS, LEGS)
    try:
        item = next(item for item in gym.train_items() if item["task"] == "leg_counting")
        entries = [reasoning_gym.create_dataset("leg_counting", seed=2**31 + i, size=1)[0] for i in range(2)]
        shown = [text for e in entries for text in (e["question"], f"<answer>{e['answer']}</answer>")]
        assert [m["content"] for m in gym.messages(item)[1:]] == [*shown, item["question"]]
        assert [m["role"] for m in gym.messages(item)] == ["system", *["user", "assistant"] * 2, "user"]
        # The answer to a question is not shown before it.
        same = {**item, "question": entries[0]["question"]}
        assert [m["content"] for m in gym.messages(same)[1:]] == [*shown[2:], entries[0]["question"]]
        assert plain.messages(item) == [gym.messages(item)[0], gym.messages(item)[-1]]
        assert gym.train_items() == plain.train_items()
    finally:
        asyncio.run(gym.close())
        asyncio.run(plain.close())


def test_a_task_that_stores_no_answers_has_no_worked_examples():
    gym = made(Task("rush_hour"), num_examples=1, allow_unsound=True)
    with pytest.raises(ConfigError, match=r"\['rush_hour'\] store no answers to show: .* num_examples: 0"):
        closed(gym)


def test_a_held_out_question_is_no_worked_example():
    easy = Task("chain_sum", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
    gym = made(easy, num_items=1, num_validation=60, num_examples=40)
    try:
        held_out = gym.validation_items()
        shown = {message["content"] for message in gym.messages(held_out[0])[1:-1]}
        assert len(shown) > 20
        assert not shown & {item["question"] for item in held_out}
    finally:
        asyncio.run(gym.close())


def test_levels_are_those_of_the_library():
    """At level n, chain_sum has up to n + 2 terms of up to n + 1 digits."""
    gym = made(Task("chain_sum", levels=3), LEGS, num_items=24, num_validation=12)
    try:
        for item in (*gym.train_items(), *gym.validation_items()):
            if item["task"] == "leg_counting":
                assert "level" not in item
                assert gym.difficulty(item) is None
                continue
            level = item["index"] % 3
            limits = {"min_terms": 2, "max_terms": 2 + level, "min_digits": 1, "max_digits": 1 + level}
            entry = reasoning_gym.create_dataset("chain_sum", seed=item["index"], size=1, **limits)[0]
            assert (item["level"], item["question"]) == (level, entry["question"])
            assert gym.difficulty(item) == Difficulty("chain_sum", level)
            (rollout,) = scored(gym, item, f"<answer>{item['answer']}</answer>")
            assert rollout.rewards["score"] == 1.0
    finally:
        asyncio.run(gym.close())


def test_three_steps_of_fit(command_folder, tiny_model):
    settings = yaml.safe_load(TINY % tiny_model)
    settings["trainer"] |= {"max_steps": 3, "limit_val_batches": 1}
    settings["data"] |= {"batch_size": 4, "steps_per_epoch": 3}
    settings["data"]["sampling"]["max_length"] = 1500
    tasks = [{"name": "chain_sum", "weight": 2, "config": {"max_terms": 2}}, {"name": "leg_counting"}]
    arguments = {"tasks": tasks, "num_items": 12, "num_validation": 4}
    settings["data"]["environment"] = {
        "class_path": "fuchsia_pl.library.reasoning_gym.ReasoningGym",
        "init_args": arguments,
    }
    (command_folder / "run.yaml").write_text(yaml.safe_dump(settings))
    cli = FuchsiaCLI(["fit", "--config", "run.yaml"])
    assert cli.trainer.global_step == 3
    header = (cli.run_folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"reward/score", "rollout/accuracy", "count/score_timeout", "count/score_error"} <= set(header)
    assert {"reward/accuracy_chain_sum", "validation/reward/accuracy_leg_counting"} <= set(header)
