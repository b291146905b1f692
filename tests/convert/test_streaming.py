"""Conversions by streaming: shards, memory, resumption, hashes, and what can go wrong with a disk or a source meanwhile."""

import hashlib
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hylo.config import ConfigError
from megatron_hylo.convert import streaming
from megatron_hylo.convert.safetensors_reader import SafetensorsSource
from megatron_hylo.convert.to_hf import convert_megatron_to_hf
from megatron_hylo.convert.to_megatron import convert_hf_to_megatron
from megatron_hylo.convert.verify_hashes import verify_hashes
from megatron_hylo.io import overlap, read_json, read_manifest, verify_manifest
from megatron_hylo.models.checkpoint import load_model
from tests.conftest import tiny_hf_model

SHARD = 40_000  # bytes: several shards of a tiny model


@pytest.fixture
def folder(tmp_path):
    tiny_hf_model("qwen3", False).bfloat16().save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    return tmp_path / "hf"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def count_reads(monkeypatch, fail_after: int | None = None) -> list[str]:
    """Record the tensors that are read; the read after so many raises an interrupt, as a kill would end the process."""
    seen: list[str] = []
    read = SafetensorsSource.read

    def counted(self, name):
        seen.append(name)
        if fail_after is not None and len(seen) > fail_after:
            raise KeyboardInterrupt
        return read(self, name)

    monkeypatch.setattr(SafetensorsSource, "read", counted)
    return seen


def test_shards_do_not_change_the_model(one_rank, folder, tmp_path):
    """Any shard size gives the same weights both ways, in files of that size, with the hashes of the same tensors."""
    convert_hf_to_megatron(folder, tmp_path / "one", verify=False)
    convert_hf_to_megatron(folder, tmp_path / "many", shard_bytes=SHARD)
    assert len(list((tmp_path / "many" / "weights").glob("weights_*"))) > 3
    one, many = (dict(load_model(tmp_path / name).named_parameters()) for name in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)
    convert_megatron_to_hf(tmp_path / "many", tmp_path / "back", shard_bytes=SHARD)
    for name in ("one", "many", "back"):
        verify_manifest(tmp_path / name)
    listed = [read_json(tmp_path / name / "tensors.json") for name in ("one", "many", "back")]
    assert listed[0] == listed[1] == listed[2]
    shards = sorted((tmp_path / "back").glob("model-*.safetensors"))
    assert len(shards) > 3 and all(shard.stat().st_size < SHARD + 5000 for shard in shards)
    before, after = (
        {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}
        for path in (folder, tmp_path / "back")
    )
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_tensor_that_is_stored_as_it_is_is_hashed_once(one_rank, folder, tmp_path, monkeypatch):
    """Parts of files of weights have the hashes of tensors.json; others are taken only of interleaved linear_qkv."""
    hashed: list[bytes] = []
    right = streaming.tensor_sha256
    monkeypatch.setattr(streaming, "tensor_sha256", lambda value: (hashed.append(right(value)), hashed[-1])[1])
    monkeypatch.setattr(overlap, "LARGE_BYTES", 1)
    convert_hf_to_megatron(folder, tmp_path / "out")
    source = SafetensorsSource(folder)
    assert len(hashed) == len(source.stored) + source.config.num_hidden_layers  # each layer's linear_qkv
    manifest = read_manifest(tmp_path / "out")
    listed = {entry["sha256"] for entry in read_json(tmp_path / "out" / "tensors.json")["tensors"].values()}
    for name in (n for n in manifest if n.startswith("weights/weights_")):
        content, entry, found = (tmp_path / "out" / name).read_bytes(), manifest[name], []
        for size in entry["parts"]:
            found.append(hashlib.sha256(content[:size]).digest())
            content = content[size:]
        assert not content and hashlib.sha256(b"".join(found)).hexdigest() == entry["sha256"]
        interleaved = [digest for digest in listed if bytes.fromhex(digest) not in found]
        assert len(interleaved) <= 3 * source.config.num_hidden_layers
    verify_manifest(tmp_path / "out")


def test_a_killed_conversion_goes_on_at_its_shard(one_rank, folder, tmp_path, monkeypatch):
    total = len(SafetensorsSource(folder).stored)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        count_reads(patch, fail_after=total * 2 // 3)
        convert_hf_to_megatron(folder, tmp_path / "out", verify=False, shard_bytes=SHARD)
    assert names(tmp_path) == [".out.lock", ".out.shards", "hf"] or names(tmp_path) == [".out.shards", "hf"]
    again = count_reads(monkeypatch)
    convert_hf_to_megatron(folder, tmp_path / "out", verify=False, shard_bytes=SHARD)
    assert 0 < len(again) < total * 2 // 3 and not (tmp_path / ".out.shards").exists()
    monkeypatch.undo()
    convert_hf_to_megatron(folder, tmp_path / "whole", verify=False)
    assert read_json(tmp_path / "out" / "tensors.json") == read_json(tmp_path / "whole" / "tensors.json")


def test_shards_of_another_source_are_not_kept(one_rank, folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        count_reads(patch, fail_after=20)
        convert_hf_to_megatron(folder, tmp_path / "out", verify=False, shard_bytes=SHARD)
    os.utime(sorted(folder.glob("model-*"))[0])
    again = count_reads(monkeypatch)
    convert_hf_to_megatron(folder, tmp_path / "out", verify=False, shard_bytes=SHARD)
    assert len(again) == len(SafetensorsSource(folder).stored)


def test_a_source_that_changes_meanwhile_is_refused(one_rank, folder, tmp_path, monkeypatch):
    read, last = SafetensorsSource.read, sorted(folder.glob("model-*"))[-1]

    def touched(self, name):
        if name.startswith("model.layers.1."):
            last.write_bytes(last.read_bytes()[:-7])
        return read(self, name)

    monkeypatch.setattr(SafetensorsSource, "read", touched)
    with pytest.raises(ConfigError, match=f"{last.name} was changed while it was read"):
        convert_hf_to_megatron(folder, tmp_path / "out", verify=False, shard_bytes=SHARD)
    assert "out" not in names(tmp_path) and ".out.shards" not in names(tmp_path)


def test_a_full_disk_keeps_what_is_done(one_rank, folder, tmp_path, monkeypatch):
    """A limit on the size of a file stops the writer as a full disk does; without it, the rest is made."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    grown = {"left": 12}  # in the sixth shard
    write = streaming.PartsFile.write

    def limited(self, data):
        grown["left"] -= len(data) > 5000
        if not grown["left"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # enough for records
        return write(self, data)

    try:
        with monkeypatch.context() as patch, pytest.raises(ConfigError, match="the disk is full: .*out was not written"):
            patch.setattr(streaming.PartsFile, "write", limited)
            convert_hf_to_megatron(folder, tmp_path / "out", verify=False, shard_bytes=SHARD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = names(tmp_path / ".out.shards")
    assert "out" not in names(tmp_path) and not any(name.endswith(".partial") for name in kept)
    assert len(kept) == 1 + 2 * sum(name.startswith("shard_") and name.endswith(".json") for name in kept)
    again = count_reads(monkeypatch)
    convert_hf_to_megatron(folder, tmp_path / "out", verify=False, shard_bytes=SHARD)
    assert 0 < len(again) < len(SafetensorsSource(folder).stored)


def test_too_little_space_is_said_before_anything_is_read(one_rank, folder, tmp_path, monkeypatch):
    seen = count_reads(monkeypatch)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(ConfigError, match=r"out needs 0\.\d GB more, and the disk has 0\.0 GB free"):
        convert_hf_to_megatron(folder, tmp_path / "out", verify=False)
    assert not seen and "out" not in names(tmp_path)


def test_quick_verification_names_the_tensor_that_differs(one_rank, folder, tmp_path):
    """By hashes of values: between a source and its conversion, and a conversion and its export."""
    convert_hf_to_megatron(folder, tmp_path / "megatron", verify=False)
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "back", verify=False)
    assert verify_hashes(folder, tmp_path / "megatron").ok and verify_hashes(tmp_path / "back", tmp_path / "megatron").ok
    file = next(f for f in folder.glob("model-*") if "model.layers.1.mlp.up_proj.weight" in load_file(f))
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    result = verify_hashes(folder, tmp_path / "megatron")
    assert result.differing == ["model.layers.1.mlp.up_proj.weight: other values"] and not result.ok
    (tmp_path / "megatron" / "tensors.json").unlink()  # a folder of an earlier version
    (tmp_path / "megatron" / "manifest.json").write_text('{"files": {}}')
    assert verify_hashes(folder, tmp_path / "megatron").differing == result.differing
