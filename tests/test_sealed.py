"""Sealed folders: whole or absent, and damage is named."""

import pytest

from megatron_hylo.config import ConfigError
from megatron_hylo.sealed import DamagedError, is_sealed, sealed_directory, verify_sealed


def make(path, text="content"):
    with sealed_directory(path) as folder:
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


def test_full_disk_ends_in_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="disk is full"):
        with sealed_directory(tmp_path / "a"):
            raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
