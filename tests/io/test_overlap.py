"""New files: hashed as a whole or in parts, and written past the page cache where the file system allows that."""

import errno
import hashlib
import os

import pytest

from megatron_hylo.io import DamagedError, has_manifest, overlap, sha256, verify_manifest, write_json
from megatron_hylo.io.overlap import HashedFile, PartsFile

LARGE = overlap.LARGE_BYTES


def contents() -> list[bytes]:
    """Small and large buffers, as an archive of tensors has them."""
    return [b"head", os.urandom(7), os.urandom(LARGE), os.urandom(LARGE + 3), b"between", os.urandom(LARGE - 1), b"end"]


def write_parts(path) -> tuple[dict, list[bytes]]:
    """Write all contents, the large ones but the last of those hashed elsewhere."""
    file, written = PartsFile(path), contents()
    for data in written:
        with file.hashed_elsewhere(len(data), hashlib.sha256(data).digest):
            file.write(data)
    return file.close(), written


def test_a_file_in_parts_has_the_sha256_of_their_sha256(tmp_path):
    entry, written = write_parts(tmp_path / "file")
    parts = [written[0] + written[1], written[2], written[3], b"".join(written[4:])]
    assert (tmp_path / "file").read_bytes() == b"".join(written)
    assert entry == {
        "bytes": sum(map(len, written)),
        "parts": [len(part) for part in parts],
        "sha256": hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest(),
    }
    assert sha256(tmp_path / "file", parts=entry["parts"]) == entry["sha256"]


def test_a_file_hashed_as_a_whole_has_the_sha256_of_hashlib(tmp_path):
    file, written = HashedFile(tmp_path / "file"), contents()
    for data in written:
        file.write(data)
    whole = b"".join(written)
    assert file.close() == {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    assert (tmp_path / "file").read_bytes() == whole and sha256(tmp_path / "file") == hashlib.sha256(whole).hexdigest()


@pytest.mark.parametrize("place", ["first", "large", "last"])
def test_damage_of_any_part_is_found(tmp_path, place):
    """One bit in a part that was hashed here, in one that was hashed elsewhere, and in the last."""
    (tmp_path / "a").mkdir()
    entry, _ = write_parts(tmp_path / "a" / "file")
    write_json(tmp_path / "a" / "manifest.json", {"files": {"file": entry}})
    verify_manifest(tmp_path / "a")
    content = bytearray((tmp_path / "a" / "file").read_bytes())
    content[{"first": 0, "large": LARGE, "last": -1}[place]] ^= 1
    (tmp_path / "a" / "file").write_bytes(content)
    with pytest.raises(DamagedError, match="file does not have the sha256"):
        verify_manifest(tmp_path / "a")


@pytest.mark.parametrize("parts", ["abc", [1.5], [1, 2], [3, "1"]])
def test_parts_that_do_not_add_up_are_a_damaged_manifest(tmp_path, parts):
    (tmp_path / "file").write_text("four")
    write_json(tmp_path / "manifest.json", {"files": {"file": {"bytes": 4, "sha256": "", "parts": parts}}})
    assert has_manifest(tmp_path)
    with pytest.raises(DamagedError, match="lists no sizes and hashes"):
        verify_manifest(tmp_path)


@pytest.mark.parametrize("refused", ["nothing", "open", "write", "sizes"])
def test_what_is_written_does_not_depend_on_the_file_system(tmp_path, monkeypatch, refused):
    """A file system may refuse O_DIRECT when a file is opened, when it is written, or in sizes that are no whole sectors."""
    right = os.open

    def refusing(name, flags, mode=0o777):
        if flags & overlap.DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return right(name, flags, mode)

    class Refusing:
        def __init__(self, file):
            self.file, self.fileno, self.close = file, file.fileno, file.close

        def write(self, data):
            if overlap.fcntl.fcntl(self.file, overlap.fcntl.F_GETFL) & overlap.DIRECT:
                raise OSError(errno.EINVAL, "not so")
            return self.file.write(data)

    monkeypatch.setattr(overlap, "BLOCK_BYTES", 5000 if refused == "sizes" else 8192)
    with monkeypatch.context() as patch:
        if refused == "open":
            patch.setattr(overlap.os, "open", refusing)
        file, written = HashedFile(tmp_path / "file"), contents()
    if refused == "write":
        file.file = Refusing(file.file)
    for data in written:
        file.write(data)
    assert file.close()["bytes"] == file.tell() == sum(map(len, written))
    assert (tmp_path / "file").read_bytes() == b"".join(written)
