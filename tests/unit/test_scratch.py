"""Files of ended processes are removed; those of running ones, of other users and of other machines are kept."""

import mmap
import os
import subprocess
import sys
import tempfile
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from fuchsia_pl import scratch

LEAVE = """
import os, sys
from fuchsia_pl import scratch
folder, file = scratch.scratch_folder("sync"), scratch.scratch_file("tools", ".log")
sys.stdout.write(f"{folder.name} {file}")
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(scratch, "RAM_BACKED", tmp_path / "shm")
    monkeypatch.setattr(scratch, "SEGMENT", scratch.re.compile(rf"{tmp_path}/shm/((?:psm_|sem\.)[\w.-]+)"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "shm").mkdir()
    (tmp_path / "tmp").mkdir()
    return tmp_path


def test_what_a_dead_process_left_is_removed_and_nothing_else(places, monkeypatch):
    environment = {**os.environ, "TMPDIR": str(places / "tmp"), "PYTHONPATH": str(Path(scratch.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", LEAVE], env=environment, capture_output=True, text=True, check=True)
    left = {Path(name) for name in done.stdout.split()}
    assert len(left) == 2
    assert all(path.exists() and path.stat().st_mode & 0o077 == 0 for path in left)
    mine, in_memory = scratch.scratch_folder("sync"), scratch.scratch_folder("sync", place=scratch.RAM_BACKED)
    assert Path(in_memory.name).parent == places / "shm"
    parts = next(iter(left)).name.split("-")
    others = {
        "of another machine": [*parts[:2], "0" * 8, *parts[3:]],
        "of another user": [parts[0], str(os.getuid() + 1), *parts[2:]],
        "of something else": ["other", *parts[1:]],
    }
    for name, words in others.items():
        (places / "tmp" / ("-".join(words) + name.replace(" ", "-"))).mkdir()
    target = places / "precious"
    target.mkdir()
    link = places / "tmp" / f"{next(iter(left)).name}-link"
    link.symlink_to(target)
    assert set(scratch.remove_left_behind()) == left
    assert not any(path.exists() for path in left)
    assert Path(mine.name).exists()
    assert Path(in_memory.name).exists()
    assert link.is_symlink()
    assert len(list((places / "tmp").iterdir())) == 3 + 1 + 1  # others, mine, the link
    # As another user it would change nothing.
    dead = "-".join([*parts[:4], "1", "x", "y"])
    (places / "tmp" / dead).mkdir()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert scratch.remove_left_behind() == []


def test_an_id_that_is_used_again_is_another_process(places):
    name = scratch.owner_name().rpartition("-")
    (places / "tmp" / f"{name[0]}-{int(name[2]) - 1}-sync-x").mkdir()  # this process's id, an earlier start
    assert len(scratch.remove_left_behind()) == 1


def test_the_shared_memory_that_a_folder_names_goes_with_it(places):
    """Except for a segment with the name of a removed one."""
    folder = places / "tmp" / f"{scratch.owner_name().rpartition('-')[0]}-1-vllm-x"
    folder.mkdir()
    (places / "shm/psm_a").touch()
    (places / "shm/psm_b").touch()
    inode = (places / "shm/psm_a").stat().st_ino
    (folder / scratch.SEGMENTS_FILE).write_text(f"psm_a {inode}\npsm_b {inode}\n../../precious {inode}\npsm_")
    assert scratch.remove_left_behind() == [folder]
    assert [file.name for file in (places / "shm").iterdir()] == ["psm_b"]


def test_shared_memory_that_a_living_process_has_mapped_stays(places):
    """The ended process had mapped it, but may not have created it."""
    folder = places / "tmp" / f"{scratch.owner_name().rpartition('-')[0]}-1-vllm-x"
    folder.mkdir()
    inodes = {}
    for name in ("psm_ours", "psm_theirs"):
        (places / "shm" / name).write_bytes(b"0" * 4096)
        inodes[name] = (places / "shm" / name).stat().st_ino
    (folder / scratch.SEGMENTS_FILE).write_text("".join(f"{name} {inode}\n" for name, inode in inodes.items()))
    with (places / "shm/psm_theirs").open("r+b") as stream, mmap.mmap(stream.fileno(), 4096):
        assert scratch.mapped_segments([os.getpid()]) == {"psm_theirs": inodes["psm_theirs"]}
        assert scratch.remove_left_behind() == [folder]
        assert [file.name for file in (places / "shm").iterdir()] == ["psm_theirs"]
    scratch.remove_segments(inodes)
    assert list((places / "shm").iterdir()) == []


def test_where_nothing_tells_who_lives_nothing_is_removed(places, monkeypatch):
    monkeypatch.setattr(scratch, "PROC", places / "proc")
    living = scratch.scratch_folder("sync")
    assert "-0-sync-" in living.name  # no start in its name
    assert scratch.remove_left_behind() == []
    assert Path(living.name).exists()


def test_segments_are_found_in_the_maps_of_their_processes(tmp_path):
    segment = shared_memory.SharedMemory(create=True, size=4096)
    try:
        assert segment.name in scratch.mapped_segments([os.getpid(), 2**30])
        scratch.record_segments(tmp_path, [os.getpid()])
        inode = Path("/dev/shm", segment.name).stat().st_ino
        assert f"{segment.name} {inode}" in (tmp_path / scratch.SEGMENTS_FILE).read_text().splitlines()
    finally:
        segment.close()
        segment.unlink()
