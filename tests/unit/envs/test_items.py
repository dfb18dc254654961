import json

import pytest

from fuchsia_pl.envs import ConfigError, SingleTurnEnvironment


class FromData(SingleTurnEnvironment):
    """An environment whose items come from where its arguments say."""


def test_local_files_become_items_in_order(tmp_path):
    rows = [{"prompt": f"question {n}", "n": n} for n in range(3)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = FromData(train_file=str(file), validation_file=str(file))
    assert [dict(environment.train_items()[n]) for n in range(3)] == rows
    assert len(environment.validation_items()) == 3
    assert environment.messages(rows[1]) == [{"role": "user", "content": "question 1"}]
    other = FromData(train_file=str(file), prompt_field="n")
    assert other.messages(rows[1]) == [{"role": "user", "content": "1"}]
    with pytest.raises(ConfigError, match=r"has no field 'q', it has \['n', 'prompt'\]"):
        FromData(train_file=str(file), prompt_field="q").messages(rows[0])


def test_what_cannot_be_read_is_told(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"FromData has no train items: set data\.environment\.init_args\.train_file"):
        FromData().train_items()
    with pytest.raises(ConfigError, match="there is no file"):
        FromData(validation_file="nowhere.jsonl").validation_items()
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{'no': json\n")
    with pytest.raises(ConfigError, match="could not be read from"):
        FromData(train_file=str(broken)).train_items()
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no network")))
    with pytest.raises(ConfigError, match=r"openai/gsm8k \(main, split train\) \(ConnectionError: no network\)"):
        FromData(dataset="openai/gsm8k", dataset_config="main").train_items()


def test_the_hub_is_asked_for_the_split_that_is_named(monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: asked.append((a, k)) or [{"prompt": "q"}])
    environment = FromData(dataset="a/b", dataset_config="c", train_split="t", validation_split="v")
    assert environment.train_items() == environment.train_items() == [{"prompt": "q"}]
    environment.validation_items()
    assert asked == [(("a/b", "c"), {"split": "t"}), (("a/b", "c"), {"split": "v"})]
