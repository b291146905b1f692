"""Atomic folders: whole or absent, only what is ours is replaced, modes as the umask says."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from megatron_hylo.config import ConfigError
from megatron_hylo.io import (
    _folders,
    atomic_directory,
    check_free,
    has_manifest,
    output_lock,
    remove_atomic_directory,
    verify_manifest,
)
from tests.io.conftest import make


def test_folder_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        with atomic_directory(path) as folder:
            (folder / "file").write_text("half")
            assert not path.exists()
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    make(path)
    assert has_manifest(path)
    verify_manifest(path)


def test_existing_folder_is_kept_unless_asked(tmp_path):
    make(tmp_path / "a", "old")
    with pytest.raises(ConfigError, match="already exists"):
        make(tmp_path / "a")
    with pytest.raises(RuntimeError):
        with atomic_directory(tmp_path / "a", overwrite=True):
            raise RuntimeError
    assert (tmp_path / "a" / "sub" / "file").read_text() == "old"
    with atomic_directory(tmp_path / "a", overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["manifest.json", "new"]


@pytest.mark.parametrize("file_system_swaps", [True, False])
def test_a_folder_that_is_replaced_is_there_at_any_moment(file_system_swaps, tmp_path, monkeypatch):
    """Whatever is removed or renamed, the name has a whole folder before and after; without swapping, not between renames."""
    make(tmp_path / "a", "old")
    if not file_system_swaps:
        monkeypatch.setattr(_folders, "_exchange", lambda *_: False)
    seen = []
    for module, name in ((os, "rename"), (shutil, "rmtree")):
        right = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, _right=right, **k: (seen.append(has_manifest(tmp_path / "a")), _right(*a, **k))
        )
    make(tmp_path / "a", "new", overwrite=True)
    monkeypatch.undo()
    if file_system_swaps and not all(seen):
        pytest.skip("this file system cannot swap two folders")
    assert all(seen) == file_system_swaps
    assert (tmp_path / "a" / "sub" / "file").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a"]


def outputs(tmp_path) -> dict[str, tuple[Path, list[Path]]]:
    """Outputs that must not be replaced: words of the refusal -> (output, sources)."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    mixed = make(tmp_path / "mixed")
    (mixed / "sub" / "thesis.tex").write_text("years of work")
    linked = make(tmp_path / "linked")
    (linked / "thesis").symlink_to(home)
    source = make(tmp_path / "source")
    below = make(tmp_path / "below", kept="a")
    inside = make(make(tmp_path / "outer") / "inside")
    blobs = make(tmp_path / "blobs", weights="w")
    snapshot = tmp_path / "snapshot"  # as the cache of the Hugging Face hub has them
    snapshot.mkdir()
    (snapshot / "weights").symlink_to(blobs / "weights")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("years of work")
    unreadable = make(tmp_path / "unreadable")
    (unreadable / "manifest.json").write_text('{"files": {"a"')
    foreign = make(tmp_path / "foreign")
    (foreign / "manifest.json").write_text('{"files": ["a", "b"]}')
    return {
        "home was not made by megatron_hylo": (home, []),
        "mixed/sub/thesis.tex was put there by somebody else": (mixed, []),
        "linked/thesis was put there by somebody else": (linked, []),
        "source is what is read": (source, [None, source]),
        "blobs holds what is read": (blobs, [snapshot]),
        "below holds what is read": (below, [below / "kept"]),
        "outer/inside lies in what is read": (inside, [tmp_path / "outer"]),
        "link is a symbolic link to": (tmp_path / "link", []),
        "dangling is a symbolic link to": (tmp_path / "dangling", []),
        "file is a file, and a folder is to be made": (tmp_path / "file", []),
        "file is a file, so .*file/a/b cannot be made": (tmp_path / "file" / "a" / "b", []),
        "is longer than the 255 bytes": (tmp_path / ("n" * 250), []),
        "unreadable is not overwritten: .*manifest.json is not readable JSON": (unreadable, []),
        "foreign is not overwritten: .*manifest.json lists no sizes": (foreign, []),
        "/ cannot be an output": (Path("/"), []),
        "somewhere is what is read": (make(tmp_path / "somewhere"), [tmp_path / "home" / ".." / "somewhere"]),
    }


def contents(folder: Path) -> dict[str, bytes | str]:
    """All files and links by path."""
    files = {p: p.readlink().as_posix() if p.is_symlink() else p.read_bytes() for p in folder.rglob("*") if not p.is_dir()}
    return {p.relative_to(folder).as_posix(): content for p, content in files.items()}


def test_nothing_of_somebody_elses_is_replaced_and_nothing_is_written_before_that_is_said(tmp_path):
    cases = outputs(tmp_path)
    before, entered = contents(tmp_path), []
    for words, (path, sources) in cases.items():
        with pytest.raises(ConfigError, match=words):
            with atomic_directory(path, overwrite=True, sources=sources) as folder:
                entered.append(folder)
        assert contents(tmp_path) == before and not entered, words


def test_an_empty_folder_and_what_python_and_nfs_leave_are_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", overwrite=True)
    (make(tmp_path / "used") / "__pycache__").mkdir()
    (tmp_path / "used" / "__pycache__" / "a.pyc").write_text("")
    make(tmp_path / "used", "new", overwrite=True)
    assert (tmp_path / "used" / "sub" / "file").read_text() == "new" and not (tmp_path / "used" / "__pycache__").exists()


def test_what_is_put_into_a_folder_while_it_is_made_anew_is_kept(tmp_path, caplog):
    make(tmp_path / "a", "old")
    with atomic_directory(tmp_path / "a", overwrite=True) as folder:
        (folder / "new").write_text("new")
        (tmp_path / "a" / "thesis.tex").write_text("years of work")
    verify_manifest(tmp_path / "a")
    (kept,) = tmp_path.glob("a.replaced-*")
    assert (kept / "thesis.tex").read_text() == "years of work" and str(kept) in caplog.text


def test_a_folder_that_appears_while_another_is_made_is_not_replaced(tmp_path):
    with pytest.raises(ConfigError, match="a was not written"):
        with atomic_directory(tmp_path / "a"):
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "thesis.tex").write_text("years of work")
    assert contents(tmp_path) == {"a/thesis.tex": b"years of work"}


def test_a_finished_folder_with_somebody_elses_file_is_not_removed(tmp_path, caplog):
    for name in ("a", "b"):
        make(tmp_path / name)
    (tmp_path / "b" / "notes.txt").write_text("note")
    remove_atomic_directory(tmp_path / "a")
    remove_atomic_directory(tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["b"] and "notes.txt" in caplog.text
    verify_manifest(tmp_path / "b")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_place_of_another_user_is_refused_before_the_work():
    place = Path(tempfile.mkdtemp(dir="/tmp"))  # others cannot enter the folders of a run of tests
    place.chmod(0o755)
    (place / "closed").mkdir(mode=0o700)
    (place / "run").mkdir()
    os.chown(place / "run", 65534, -1)
    try:
        os.seteuid(65534)
        for path in (place / "a", place / "new" / "a", place / "closed" / "a"):
            with pytest.raises(ConfigError, match=f"{path}.*(cannot be written|permission denied); change its permissions"):
                check_free(path, overwrite=False)
            with pytest.raises(ConfigError, match=f"{path}.*(cannot be written|permission denied); change its permissions"):
                with output_lock(path):
                    pass
        with output_lock(place / "run"), atomic_directory(place / "run" / "model"):
            assert (place / "run" / ".lock").is_file()
        assert [p.name for p in (place / "run").iterdir()] == ["model"]
    finally:
        os.seteuid(0)
        shutil.rmtree(place)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o027, 0o077])
def test_modes_are_what_the_umask_says_whoever_made_the_files(umask, tmp_path):
    former = os.umask(umask)
    try:
        with atomic_directory(tmp_path / "a") as folder:
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:  # 0600, as safetensors' are
                file.write(b"a")
            with tempfile.TemporaryDirectory() as scratch:  # 0700, as a tokenizer's that is copied
                shutil.copytree(scratch, folder / "copied")
            (folder / "script").touch(mode=0o777)
        (tmp_path / "plain").mkdir()
        (tmp_path / "plain" / "file").touch()
    finally:
        os.umask(former)
    for entry in ((tmp_path / "a"), *(tmp_path / "a").rglob("*")):
        like = tmp_path / "plain" if entry.is_dir() else tmp_path / "plain" / "file"
        assert entry.stat().st_mode == like.stat().st_mode, entry


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_ends_in_one_sentence(number, tmp_path):
    with pytest.raises(ConfigError, match="disk is full"):
        with atomic_directory(tmp_path / "a"):
            raise OSError(number, os.strerror(number))
    assert list(tmp_path.iterdir()) == []


WRITER = """
import resource, sys
from megatron_hylo.models.checkpoint import save_model
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.platform.distributed import session
from tests.conftest import tiny_config

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    with session():
        save_model(build_model(tiny_config()), sys.argv[1])
"""


def test_a_checkpoint_writer_that_fails_ends_in_one_sentence(tmp_path):
    """Megatron-Core's own writer process, whose files may be no larger than 50 kB."""
    script, where = tmp_path / "writer.py", tmp_path / "models"
    script.write_text(WRITER)
    where.mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, script, where / "a"], env=environment, capture_output=True, text=True)
    assert "ConfigError" in result.stderr and f"{where}/a was not written" in result.stderr, result.stderr[-2000:]
    assert list(where.iterdir()) == []


def test_an_error_of_the_operating_system_is_a_sentence_that_names_the_folder(tmp_path):
    with pytest.raises(ConfigError, match="a was not written.*No such file.*; look at the path"):
        with atomic_directory(tmp_path / "a") as folder:
            (folder / "absent" / "file").write_text("")
    assert list(tmp_path.iterdir()) == []


def test_parts_on_a_disk_that_another_rank_does_not_see_are_refused(tmp_path, monkeypatch):
    assert _folders.staging_directory(tmp_path / "out", "parts", "made", {"of": 1}) == tmp_path / ".out.parts"
    monkeypatch.setattr(_folders, "gather", lambda seen: [seen, False])
    with pytest.raises(ConfigError, match="rank 1 does not see .*out.parts, .* put the output on a disk that all ranks share"):
        _folders.staging_directory(tmp_path / "out", "parts", "made", {"of": 1})
