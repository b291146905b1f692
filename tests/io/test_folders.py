"""Sealed folders: whole or absent, and damage is named."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hylo.config import ConfigError
from megatron_hylo.io import DamagedError, _folders, is_sealed, sealed_directory, verify_sealed


def make(path, text="content", overwrite=False):
    with sealed_directory(path, overwrite) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text(text)


def test_folder_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        with sealed_directory(path) as folder:
            (folder / "file").write_text("half")
            assert not path.exists()
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    make(path)
    assert is_sealed(path)
    verify_sealed(path)


def test_existing_folder_is_kept_unless_asked(tmp_path):
    make(tmp_path / "a", "old")
    with pytest.raises(ConfigError, match="already exists"):
        make(tmp_path / "a")
    with pytest.raises(RuntimeError):
        with sealed_directory(tmp_path / "a", overwrite=True):
            raise RuntimeError
    assert (tmp_path / "a" / "sub" / "file").read_text() == "old"
    with sealed_directory(tmp_path / "a", overwrite=True) as folder:
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
            module, name, lambda *a, _right=right, **k: (seen.append(is_sealed(tmp_path / "a")), _right(*a, **k))
        )
    make(tmp_path / "a", "new", overwrite=True)
    monkeypatch.undo()
    if file_system_swaps and not all(seen):
        pytest.skip("this file system cannot swap two folders")
    assert all(seen) == file_system_swaps
    assert (tmp_path / "a" / "sub" / "file").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(("damage", "word"), [("cut", "bytes"), ("flip", "sha256"), ("remove", "missing")])
def test_damage_is_found_and_the_file_named(tmp_path, damage, word):
    make(tmp_path / "a")
    file = tmp_path / "a" / "sub" / "file"
    if damage == "remove":
        file.unlink()
    else:
        file.write_text("conten" if damage == "cut" else "cOntent")
    with pytest.raises(DamagedError, match=f"file.*{word}"):
        verify_sealed(tmp_path / "a")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_ends_in_one_sentence(number, tmp_path):
    with pytest.raises(ConfigError, match="disk is full"):
        with sealed_directory(tmp_path / "a"):
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
