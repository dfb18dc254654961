import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fuchsia_pl.engines.base import VERSION_FILE, EngineError
from fuchsia_pl.engines.published import named, publish, remove_published


def write(folder: Path, version: int = 3, weight: float = 1.0, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.tensor([weight])}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, **config}))
    (folder / VERSION_FILE).write_text(str(version))
    return folder


def test_the_name_says_version_and_content(tmp_path):
    root = tmp_path / "shared"
    first = publish(write(tmp_path / "a"), 3, root)
    assert first.name.startswith("policy-3-")
    assert len(first.name) == len("policy-3-") + 12
    assert publish(write(tmp_path / "again"), 3, root) == first
    others = [
        publish(write(tmp_path / "weights", weight=2.0), 3, root),
        publish(write(tmp_path / "config", r=8), 3, root),
        publish(write(tmp_path / "version", version=4), 4, root),
    ]
    assert len({first.name, *(other.name for other in others)}) == 4
    assert others[2].name.removeprefix("policy-4-") == first.name.removeprefix("policy-3-")
    # A server may still have the same weights from the deleted folder of an earlier run.
    assert publish(write(tmp_path / "b"), 3, tmp_path / "elsewhere").name != first.name
    assert sorted(f.name for f in root.iterdir()) == sorted([first.name, *(other.name for other in others)])


def test_whole_weights_differ_by_any_of_their_files(tmp_path):
    names = set()
    for number, weights in enumerate([(1.0, 2.0), (1.0, 3.0), (1.0, 3.0)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        for shard, weight in enumerate(weights):
            save_file({"a": torch.tensor([weight])}, folder / f"model-{shard}.safetensors")
        (folder / "config.json").write_text("{}")
        (folder / VERSION_FILE).write_text("3")
        names.add(publish(folder, 3, tmp_path / "root").name)
    assert len(names) == 2
    # Ranks on machines that see the folder under another path wait for what the first rank sent.
    assert named(folder, 3, tmp_path / "elsewhere").name in names


def test_the_order_of_layers_is_no_content(tmp_path):
    """PEFT writes them in the order of hashes, which differs between the processes of the ranks."""
    names = []
    for number, layers in enumerate((["q_proj", "v_proj"], ["v_proj", "q_proj"], ["q_proj", "k_proj"])):
        folder = write(tmp_path / str(number), target_modules=layers)
        names.append(publish(folder, 3, tmp_path / "root").name)
    assert names[0] == names[1] != names[2]


def test_the_folder_is_a_whole_copy_under_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = publish(write(tmp_path / "a"), 3, Path("shared"))
    assert adapter.folder == tmp_path / "shared" / adapter.name
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (adapter.folder / file).read_bytes() == (tmp_path / "a" / file).read_bytes()


def test_another_rank_may_be_first(tmp_path, monkeypatch):
    source, root = write(tmp_path / "a"), tmp_path / "shared"
    expected = publish(source, 3, root)
    exists = Path.exists
    seen = []

    def not_yet(path: Path, **kwargs) -> bool:  # the first check of the folder is just too early
        if path == expected.folder and not seen:
            seen.append(path)
            return False
        return exists(path, **kwargs)

    monkeypatch.setattr(Path, "exists", not_yet)
    assert publish(source, 3, root) == expected
    assert seen
    assert [folder.name for folder in root.iterdir()] == [expected.name]


def test_a_rank_that_does_not_publish_knows_the_name(tmp_path):
    source, root = write(tmp_path / "a"), tmp_path / "shared"
    weights = named(source, 3, root)
    assert not root.exists()
    assert publish(source, 3, root) == weights


def test_ranks_of_one_process_id_do_not_write_into_each_others_copy(tmp_path, monkeypatch):
    """As in two containers that see one folder: the second copies while the first has not ended."""
    source, root, copied = write(tmp_path / "a"), tmp_path / "shared", []
    copytree = shutil.copytree

    def copy_while_another_does(path, partial, **kwargs):
        copied.append(partial)
        if len(copied) == 1:
            publish(source, 3, root)
        return copytree(path, partial, **kwargs)

    monkeypatch.setattr("fuchsia_pl.engines.published.shutil.copytree", copy_while_another_does)
    weights = publish(source, 3, root)
    assert len(set(copied)) == 2
    assert [folder.name for folder in root.iterdir()] == [weights.name]


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match=r"cannot be copied to data\.engine\.init_args\.adapter_folder=.*/file/x"):
        publish(write(tmp_path / "a"), 3, tmp_path / "file" / "x")


def test_the_last_to_go_takes_the_folder_with_it(tmp_path):
    root = tmp_path / "shared"
    made = [publish(write(tmp_path / f"a{version}", version), version, root) for version in (1, 2)]
    remove_published(made[0])
    assert [folder.name for folder in root.iterdir()] == [made[1].name]
    remove_published(made[1])
    remove_published(made[1])
    assert not root.exists()
