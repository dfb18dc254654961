import csv
import datetime
import gzip
import json
from decimal import Decimal

import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from pyarrow import parquet

from fuchsia_pl.envs import ConfigError, SingleTurnEnvironment
from fuchsia_pl.envs.base import check_environment
from fuchsia_pl.envs.items import read_rows
from fuchsia_pl.library.gsm8k import GSM8K
from tests.doubles import even


class FromData(SingleTurnEnvironment):
    """An environment with items from the sources in its arguments."""

    def __init__(self, csv_types=None, **sources) -> None:
        super().__init__(**sources)
        self.csv_types = csv_types or {}
        self.reward_functions = [even]


def rows_of(*files, **types):
    return list(FromData(types, train_file=[str(file) for file in files]).train_items())


def write(folder, name, content: str | bytes):
    content = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder / name


def test_local_files_become_items_in_order(tmp_path):
    rows = [{"prompt": f"question {n}", "n": n} for n in range(3)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = FromData(train_file=str(file), validation_file=str(file))
    items = environment.train_items()
    assert items is environment.train_items()
    assert [items[n] for n in range(3)] == rows
    assert (items[-1], items[1:]) == (rows[2], rows[1:])
    with pytest.raises(IndexError):
        items[3]
    items[0]["prompt"] = "changed by a reward"
    assert items[0] == rows[0]
    assert len(environment.validation_items()) == 3


# Values that json.loads reads from the line. Each comment contains the value that Arrow's type inference made of it.
AS_WRITTEN = [
    ('{"a": "2024-01-05"}', {"a": "2024-01-05"}),  # datetime(2024, 1, 5)
    ('{"a": 72}', {"a": 72}),  # 72.0, beside 0.5
    ('{"a": 0.5}', {"a": 0.5}),
    ('{"a": 9007199254740993}', {"a": 9007199254740993}),  # 9007199254740992.0
    ('{"a": 123456789012345678901234567890}', {"a": 123456789012345678901234567890}),  # a float
    ('{"b": null}', {"b": None}),  # {"a": None, "b": None}: a missing field was filled
    ('{"a": {"x": [1, "1", null]}}', {"a": {"x": [1, "1", None]}}),
    ('{"a": "\\ud83d"}', {"a": "\ud83d"}),
    ('{"a": "\u2028 \x85"}', {"a": "\u2028 \x85"}),  # not line ends in JSON
    ("{}", {}),
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a", "a.jsonl.gz"])
def test_json_lines_keep_json_types(tmp_path, name):
    rows = rows_of(write(tmp_path, name, "\ufeff" + "\r\n\n".join(line for line, _ in AS_WRITTEN)))
    assert rows == [row for _, row in AS_WRITTEN]
    assert [type(row.get("a")) for row in rows] == [type(row.get("a")) for _, row in AS_WRITTEN]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_json_array_gives_the_same_rows(tmp_path, name):
    lines, rows = [line for line, _ in AS_WRITTEN], [row for _, row in AS_WRITTEN]
    assert rows_of(write(tmp_path, name, "\ufeff[" + ", \n".join(lines) + " ]\n")) == rows
    assert rows_of(write(tmp_path, name, json.dumps(rows, indent=2))) == rows


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
SURROGATES = st.characters(categories=["Cs"])  # one alone: two may form a pair, which is another character
ROWS = st.lists(st.dictionaries(st.text() | SURROGATES, JSON_VALUES | SURROGATES, max_size=4), min_size=1, max_size=4)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(rows=ROWS, escaped=st.booleans(), indent=st.sampled_from([None, 1]))
def test_any_json_row_is_loaded_exactly(tmp_path_factory, rows, escaped, indent):
    folder = tmp_path_factory.mktemp("rows")
    try:
        written = [json.dumps(row, ensure_ascii=escaped).encode() for row in rows]
    except UnicodeEncodeError:  # half a surrogate pair has no UTF-8, only an escape
        written = [json.dumps(row).encode() for row in rows]
    array = json.dumps(rows, indent=indent)
    files = [
        write(folder, "lines.jsonl", b"\n".join(written)),
        write(folder, "lines.jsonl.gz", b"\n".join(written)),
        write(folder, "array.json", array),
        write(folder, "array.json.gz", array),
    ]
    for file in files:
        found = rows_of(file)
        # `repr` distinguishes 1, 1.0 and True, 0.0 and -0.0, and orders of keys.
        assert repr(found) == repr(rows)
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.jsonl",
            '{"a": 1}\n\n{"b": 1, "a": }',
            r"a\.jsonl, line 3, field 'a' cannot be read: Expecting value \(column 15\)",
        ),
        ("a.jsonl", '{"b": "x, "a": 1}', r"line 1, field 'b' cannot be read"),
        ("a.jsonl", '{"b": {"x": 1, "x": 1}, "c": 2}', r"line 1, field 'b' .* the key 'x' occurs twice in one object"),
        ("a.jsonl", '{"a": 1, "b": 2, "a": 1}', r"line 1 cannot be read: the key 'a' occurs twice"),
        ("a.jsonl", '{"a": 1e400}', r"line 1, field 'a' .* the number 1e400 is too large for a float"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", r"line 1, field 'a' cannot be read: Exceeds the limit"),
        ("a.jsonl", '{"a": ' + "[" * 100_000, r"line 1, field 'a' .* nested too deeply"),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": ' + "[" * 900 + "]" * 900 + "}",
            r"line 2, field 'a' .* 200 levels of lists and objects",
        ),
        ("a.json", '[{"a": ' + '{"b":' * 300 + "1" + "}" * 301 + "]", r"row 1, line 1, field 'a' .* nested too deeply"),
        ("a.jsonl", '{"a": "x\ty"}', r"line 1, field 'a' .* Invalid control character"),
        ("a.jsonl", '{"a": 1} {"a": 2}', r"line 1 cannot be read: there is text after its end \(column 10\)"),
        ("a.jsonl", '{"a": 1}\n"text"', r"line 2 cannot be read: it is a str, but a row must be a JSON object"),
        ("a.jsonl", '{"a": 1}\n[1]', r"line 2 cannot be read: it is a list"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}', r"line 2 cannot be read: byte 8 is not UTF-8"),
        ("a.jsonl", "{'no': json\n", r"line 1 cannot be read: Expecting property name"),
        ("a.jsonl", '{"a": 1', r"line 1, field 'a' cannot be read"),
        (
            "a.json",
            '[{"a": 1},\n{"b": 1, "a": x}]',
            r"a\.json, row 2, line 2, field 'a' cannot be read: Expecting value",
        ),
        ("a.json", '[{"a": 1},\n null]', r"row 2, line 2 cannot be read: it is a NoneType"),
        (
            "a.json",
            '[{"a": 1}',
            r"after row 1, line 1 cannot be read: the array lacks a comma or its closing bracket",
        ),
        ("a.json", '[{"a": 1},]', r"row 2, line 1 cannot be read"),
        ("a.json", '[{"a": 1}] {"a": 2}', r"a\.json cannot be read: there is text after the end of the array"),
        (
            "a.txt",
            "question\n",
            r"a\.txt begins with b'question', which is not a row: the supported formats are JSON lines",
        ),
        (
            "a.csv",
            'a,b\n1,2\n"1\n1",\n3\n',
            r"a\.csv, line 5, field 'b' cannot be read: the row ends before this column",
        ),
        ("a.csv", "a,b\n1,2,3\n", r"line 2 cannot be read: it has 3 values for 2 columns"),
        ("a.csv", "a,a\n1,2\n", r"line 1 cannot be read: the header must name each column once, got \['a', 'a'\]"),
        ("a.csv", 'a\n"1\n', r"line 2 cannot be read: unexpected end of data"),
        ("a.csv", b"a\n1\n\xff\n", r"line 3 cannot be read: it is not UTF-8"),
        ("a.parquet", b"PAR1 and nothing more", r"a\.parquet cannot be read: ArrowInvalid"),
        ("a.jsonl", b"\x1f\x8b\x08\x00cut off", r"a\.jsonl cannot be read \((EOFError|BadGzipFile|error)"),
        ("a.jsonl", "", r"FromData: \S+a\.jsonl has no train items"),
        ("a.json", "[ ]", "has no train items"),
        ("a.csv", "a,b\n", "has no train items"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_by_file_line_and_field(tmp_path, name, content, words):
    with pytest.raises(ConfigError, match=words) as caught:
        rows_of(write(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_a_loaded_row_is_readable_at_any_stack_depth(tmp_path):
    """The row itself is one of the 200 levels."""
    rows = rows_of(write(tmp_path, "a.jsonl", '{"a": ' + "[" * 199 + "]" * 199 + "}"))

    def read(frames):
        return read(frames - 1) if frames else rows[0]

    value, depth = read(600)["a"], 0
    while value:
        (value,), depth = value, depth + 1
    assert depth == 198
    with pytest.raises(ConfigError, match="200 levels of lists and objects are allowed"):
        rows_of(write(tmp_path, "b.jsonl", '{"a": ' + "[" * 200 + "]" * 200 + "}"))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(rows=ROWS, data=st.data())
def test_a_truncated_array_is_refused(tmp_path_factory, rows, data):
    whole = json.dumps(rows)
    cut = data.draw(st.integers(1, len(whole) - 1))
    file = write(tmp_path_factory.getbasetemp(), "cut.json", whole[:cut])
    with pytest.raises(ConfigError, match=r"cut\.json"):
        read_rows(str(file), "train", {})


def test_csv_values_are_text_except_in_declared_columns(tmp_path):
    text = 'n,answer,day,"with, comma",share,flag,messages\n007,72,2024-01-05,"a ""b""\nc",.5,True,"[{""role"": ""user""}]"\n'
    file = write(tmp_path, "a.csv", "\ufeff" + text)
    row = dict.fromkeys(["n"], "007") | {"answer": "72", "day": "2024-01-05", "with, comma": 'a "b"\nc'}
    row |= {"share": ".5", "flag": "True", "messages": '[{"role": "user"}]'}
    assert rows_of(file) == [row]
    types = {"n": "int", "answer": "float", "share": "float", "flag": "bool", "messages": "json", "day": "str"}
    typed = rows_of(file, **types)
    assert typed == [row | {"n": 7, "answer": 72.0, "share": 0.5, "flag": True, "messages": [{"role": "user"}]}]
    assert [type(typed[0][name]) for name in types] == [int, float, float, bool, list, str]
    assert rows_of(write(tmp_path, "b.tsv.gz", "a\tb\n1,2\t3\n")) == [{"a": "1,2", "b": "3"}]
    limit = csv.field_size_limit()
    long = "x" * 200_000  # the csv module's own limit is 131,072
    assert rows_of(write(tmp_path, "c.csv", f"a\n{long}\n")) == [{"a": long}]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("int", "72.0", "'72.0' is not an integer"),
        ("int", "1_000", "is not an integer"),
        ("int", "\u0667", "is not an integer"),
        ("int", '""', "'' is not an integer"),
        ("float", "nan", "'nan' is not a decimal number"),
        ("float", "1e400", "too large for a float"),
        ("bool", "yes", "'yes' is neither true nor false"),
        ("json", "[1", "column"),
    ],
)
def test_the_error_names_a_value_that_does_not_have_its_declared_type(tmp_path, kind, value, words):
    with pytest.raises(ConfigError, match=rf"a\.csv, line 3, field 'a' cannot be read: .*{words}"):
        rows_of(write(tmp_path, "a.csv", f"a\n{ {'json': '[]', 'bool': 'true'}.get(kind, '1') }\n{value}\n"), a=kind)


def test_csv_types_without_effect_are_refused(tmp_path):
    file, lines = write(tmp_path, "a.csv", "a\n1\n"), write(tmp_path, "a.jsonl", '{"a": "1"}\n')
    with pytest.raises(ConfigError, match=r"csv_types names \['b'\], but the columns of \S+a\.csv are \['a'\]"):
        rows_of(file, b="int")
    with pytest.raises(ConfigError, match=r"csv_types declares \['a'\], but \S+a\.jsonl is not a CSV file"):
        rows_of(lines, a="int")
    with pytest.raises(
        ConfigError, match=r"FromData\.csv_types declares \['a'\], but the train items are not from a CSV file"
    ):
        FromData({"a": "int"}, dataset="a/b").train_items()
    with pytest.raises(
        ConfigError, match=r"csv_types has the types \['integer'\]; allowed are \['bool', 'float', 'int'"
    ):
        check_environment(FromData({"a": "integer"}, train_file=str(file)))


# Written by hand: the value and its Parquet type.
TABLE = {
    "day": ([datetime.date(2024, 1, 5), None], pyarrow.date32()),
    "text": (["2024-01-05", "72"], pyarrow.string()),
    "count": ([9007199254740993, 72], pyarrow.int64()),
    "price": ([Decimal("18.90"), Decimal("0.01")], pyarrow.decimal128(30, 2)),
    "prompt": (
        [[{"role": "user", "content": "3 plus 4?"}], []],
        pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()})),
    ),
}


def test_parquet_and_saved_folders_keep_their_types(tmp_path):
    table = pyarrow.table({name: pyarrow.array(values, type_) for name, (values, type_) in TABLE.items()})
    rows = [{name: values[n] for name, (values, _) in TABLE.items()} for n in range(2)]
    file = tmp_path / "split=train" / "a.parquet"  # parts of the path are not columns
    file.parent.mkdir()
    parquet.write_table(table, file)
    items = FromData(train_file=str(file)).train_items()
    assert list(items) == rows
    assert [type(value) for value in items[0].values()] == [datetime.date, str, int, Decimal, list]
    dataset = Dataset(table)
    dataset.save_to_disk(tmp_path / "one")
    assert rows_of(tmp_path / "one") == rows
    DatasetDict({"train": dataset.select([1]), "held": dataset.select([0])}).save_to_disk(tmp_path / "two")
    environment = FromData(
        train_file=str(tmp_path / "two"), validation_file=str(tmp_path / "two"), validation_split="held"
    )
    assert (list(environment.train_items()), list(environment.validation_items())) == (rows[1:], rows[:1])
    with pytest.raises(ConfigError, match=r"two has no split 'test', its splits are \['held', 'train'\]"):
        FromData(validation_file=str(tmp_path / "two")).validation_items()
    with pytest.raises(
        ConfigError, match=r"the folder \S+split=train was not saved by `save_to_disk`.*name such a folder"
    ):
        rows_of(file.parent)
    numbers = Dataset.from_dict({"n": [1]})
    numbers.set_format("numpy")
    numbers.save_to_disk(tmp_path / "formatted")
    assert type(rows_of(tmp_path / "formatted")[0]["n"]) is int


def test_the_error_names_a_table_value_without_a_python_type(tmp_path):
    later = pyarrow.array([0, 10**15], pyarrow.timestamp("s"))  # some ten million years from now
    parquet.write_table(pyarrow.table({"n": [1, 2], "day": later}), tmp_path / "a.parquet")
    items = FromData(train_file=str(tmp_path / "a.parquet")).train_items()
    assert items[0]["n"] == 1
    with pytest.raises(ConfigError, match=r"a\.parquet, row 2, field 'day' cannot be read"):
        items[1]


def test_several_files_and_patterns_are_read_in_order(tmp_path):
    for name, n in (("b.jsonl", 1), ("a.jsonl", 0), ("c.csv", 2)):
        write(tmp_path, name, f'{{"n": "{n}"}}\n' if name.endswith("l") else f"n\n{n}\n")
    assert rows_of(tmp_path / "*") == [{"n": "0"}, {"n": "1"}, {"n": "2"}]
    assert rows_of(tmp_path / "c.csv", tmp_path / "[ab].jsonl") == [{"n": "2"}, {"n": "0"}, {"n": "1"}]
    items = FromData(train_file=[str(tmp_path / "*.jsonl"), str(tmp_path / "c.csv")]).train_items()
    assert [items.where(n).rpartition("/")[2] for n in range(3)] == [
        "a.jsonl, line 1",
        "b.jsonl, line 1",
        "c.csv, line 2",
    ]
    (tmp_path / "[x].jsonl").write_text('{"n": "named"}')  # a file's name may look like a pattern
    assert rows_of(tmp_path / "[x].jsonl") == [{"n": "named"}]
    with pytest.raises(ConfigError, match=r"init_args\.train_file: no file matches '\S+\*\.nothing'"):
        rows_of(tmp_path / "*.nothing")
    with pytest.raises(ConfigError, match=r"init_args\.train_file is an empty list"):
        FromData(train_file=[]).train_items()


@pytest.mark.parametrize(
    ("words", "files"),
    [
        (["--env.train_file", "a.jsonl"], "a.jsonl"),
        (["--env.train_file", '["a.jsonl", "b*.csv"]'], ["a.jsonl", "b*.csv"]),
        (["--env.train_file+", "a.jsonl", "--env.train_file+", "b*.csv"], ["a.jsonl", "b*.csv"]),
    ],
)
def test_one_or_several_files_on_the_command_line(words, files):
    parser = ArgumentParser()
    parser.add_class_arguments(GSM8K, "env")
    assert parser.parse_args(words).env.train_file == files


def test_missing_sources_are_reported(monkeypatch):
    with pytest.raises(ConfigError, match=r"FromData has no train items: set data\.environment\.init_args\.train_file"):
        FromData().train_items()
    with pytest.raises(ConfigError, match=r"init_args\.validation_file: there is no file '\S+nowhere\.jsonl'"):
        FromData(validation_file="nowhere.jsonl").validation_items()
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no network")))
    with pytest.raises(ConfigError, match=r"openai/gsm8k \(main, split train\) \(ConnectionError: no network\)"):
        FromData(dataset="openai/gsm8k", dataset_config="main").train_items()


def test_the_named_split_is_loaded_from_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: asked.append((a, k)) or [{"prompt": "q"}])
    environment = FromData(dataset="a/b", dataset_config="c", train_split="t", validation_split="v")
    assert environment.train_items() == environment.train_items() == [{"prompt": "q"}]
    environment.validation_items()
    assert asked == [(("a/b", "c"), {"split": "t"}), (("a/b", "c"), {"split": "v"})]
