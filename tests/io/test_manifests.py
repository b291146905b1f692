"""Finished folders are verified when they are opened: sizes always, hashes once; what is damaged is named."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hylo.config import ConfigError
from megatron_hylo.io import (
    DamagedError,
    _manifests,
    atomic_directory,
    read_json,
    read_verified_json,
    verify_manifest,
    verify_manifest_if_any,
)
from tests.forked import running
from tests.io.conftest import make


def damage(file: Path, kind: str) -> None:
    """Damage a file that holds "content"."""
    if kind == "missing":
        file.unlink()
    else:
        file.write_text("conten" if kind == "bytes" else "cOntent")


@pytest.mark.parametrize("kind", ["bytes", "sha256", "missing"])
def test_damage_is_found_and_the_file_named(tmp_path, kind):
    damage(make(tmp_path / "a") / "sub" / "file", kind)
    for _ in range(2):  # what failed is not remembered as right
        with pytest.raises(DamagedError, match=f"{tmp_path}/a/sub/file.*{kind}"):
            verify_manifest(tmp_path / "a")
    verify_manifest(tmp_path / "a", only=["su", "manifest.json"])  # another name, not the folder


@pytest.mark.parametrize("kind", ["bytes", "sha256", "missing"])
def test_a_card_may_be_edited(tmp_path, kind):
    with atomic_directory(tmp_path / "a") as partial:
        for name in ("README.md", "weights"):
            (partial / name).write_text("content")
    damage(tmp_path / "a" / "README.md", kind)
    verify_manifest(tmp_path / "a")
    damage(tmp_path / "a" / "weights", kind)
    with pytest.raises(DamagedError, match="a/weights"):
        verify_manifest(tmp_path / "a")


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    verify_manifest_if_any(tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "an app", "files": ["a"]}')
    verify_manifest_if_any(tmp_path)
    with pytest.raises(ConfigError, match="has no manifest.json"):
        verify_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content", ["", '{"files": {"a": {"bytes"', "[]", "null", "\x00" * 99, "[" * 100_000, '{"files": {"a": 1}}']
)
def test_a_damaged_manifest_is_named(tmp_path, content):
    (make(tmp_path / "a") / "manifest.json").write_text(content)
    with pytest.raises(DamagedError, match=f"{tmp_path}/a/manifest.json.* make "):
        verify_manifest(tmp_path / "a")


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[1]", b"\xff\xfe", b'{"b": 2}'])
def test_damaged_json_is_named_and_says_what_to_do(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(DamagedError, match=f"{tmp_path}/config.json .*; make it again, or restore it from a copy"):
        read_json(tmp_path / "config.json", ("a",))


def test_json_of_a_finished_folder_is_compared_with_its_manifest(tmp_path):
    folder = make(tmp_path / "a", **{"data.json": '{"vocab_size": 160}'})
    assert read_verified_json(folder, "data.json", ("vocab_size",)) == {"vocab_size": 160}
    (folder / "data.json").write_text('{"vocab_size": 170}')
    with pytest.raises(DamagedError, match="data.json does not have the sha256"):
        read_verified_json(folder, "data.json")


@pytest.fixture
def hashed(monkeypatch, tmp_path) -> list[str]:
    """Names of files as they are hashed, with a cache folder of the test's own that trusts times at once."""
    names, right = [], _manifests.sha256
    monkeypatch.setattr(_manifests, "sha256", lambda file, *how: (names.append(file.name), right(file, *how))[1])
    monkeypatch.setattr(_manifests, "SETTLED_SECONDS", 0.0)
    monkeypatch.setenv("MEGATRON_HYLO_CACHE", str(tmp_path / "cache"))
    return names


def test_a_file_is_hashed_once_until_it_changes(tmp_path, hashed, monkeypatch):
    folder = make(tmp_path / "a", other="o")
    for _ in range(3):
        verify_manifest(folder)
    assert sorted(hashed) == ["file", "other"]
    times = os.stat(folder / "other")
    (folder / "other").write_text("O")
    os.utime(folder / "other", ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copying tool may set them
    for _ in range(2):
        with pytest.raises(DamagedError, match="other does not have the sha256"):
            verify_manifest(folder)
    assert sorted(hashed) == ["file", "other", "other", "other"]
    monkeypatch.setattr(_manifests.platform, "node", lambda: "another machine")
    verify_manifest(folder, only=["sub"])
    assert hashed[-1] == "file"


def test_a_file_changed_just_now_is_hashed_again(tmp_path, hashed, monkeypatch):
    """Its times may stay the same when it changes once more."""
    monkeypatch.setattr(_manifests, "SETTLED_SECONDS", 600.0)  # a busy machine may take longer than the two of a user
    folder = make(tmp_path / "a")
    verify_manifest(folder)
    verify_manifest(folder)
    assert hashed == ["file", "file"]


@pytest.mark.parametrize("place", ["a file", "a file in its way", "read-only"])
def test_a_cache_that_cannot_be_written_breaks_nothing(tmp_path, hashed, monkeypatch, place):
    folder, cache = make(tmp_path / "a"), tmp_path / "cache"
    if place == "a file":
        cache.write_text("")
    elif place == "a file in its way":
        cache.mkdir()
        (cache / "verified").write_text("")
    else:
        monkeypatch.setenv("MEGATRON_HYLO_CACHE", "/proc/self")
    verify_manifest(folder)
    verify_manifest(folder)
    damage(folder / "sub" / "file", "sha256")
    with pytest.raises(DamagedError, match="sha256"):
        verify_manifest(folder)
    assert hashed == ["file"] * 3


RANK = """
import sys
import torch
from megatron_hylo.io import DamagedError, _manifests, on_main, output_lock, verify_manifest

folder, meeting, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
names, right = [], _manifests.sha256
_manifests.PROGRESS_SECONDS = 0.05

def slow(file, *how):
    names.append(file.name)
    if rank == 1:
        import time
        time.sleep(0.2)  # the other rank has done its share long before
    return right(file, *how)

_manifests.sha256 = slow
verify_manifest(folder)
found = [None, None]
torch.distributed.all_gather_object(found, names)
assert sorted(found[0] + found[1]) == ["a", "b", "c", "d", "file"] and abs(len(found[0]) - len(found[1])) == 1, found
for name in "abcd":
    if rank == 0:
        open(f"{folder}/{name}", "w").write("X")
    torch.distributed.barrier()
    try:
        verify_manifest(folder)
    except DamagedError as error:
        assert f"{folder}/{name} " in str(error), error
    else:
        raise AssertionError(f"rank {rank} does not know that {name} is damaged")
    torch.distributed.barrier()
    if rank == 0:
        open(f"{folder}/{name}", "w").write(name)
    torch.distributed.barrier()
with output_lock(folder), output_lock(folder):
    torch.distributed.barrier()
print("done")
"""


@pytest.mark.multirank
def test_ranks_share_the_hashing_and_all_know_of_damage(tmp_path):
    folder = make(tmp_path / "a", **{name: name for name in "abcd"})
    environment = os.environ | {"MEGATRON_HYLO_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(
                running([sys.executable, "-c", RANK, folder, tmp_path / "meeting", rank], env=environment,
                        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            )
            for rank in range(2)
        ]  # fmt: skip
        for process in ranks:
            out, err = process.communicate(timeout=120)
            assert out.endswith("done\n"), err[-3000:]
