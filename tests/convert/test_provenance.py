"""A model folder names its base Hugging Face model, with hashes, when the folders in between are gone."""

import hashlib
import os
import shutil
import time

import pytest

from megatron_hylo.config.upcycle import UpcycleConfig
from megatron_hylo.convert.to_hf import convert_megatron_to_hf
from megatron_hylo.convert.to_megatron import convert_hf_to_megatron
from megatron_hylo.io import provenance
from megatron_hylo.io.identity import content_identity
from megatron_hylo.io.provenance import base_models, made_by
from megatron_hylo.models.description import read_description
from megatron_hylo.upcycle.run import assemble_folder, upcycle_folder
from tests.conftest import tiny_hf_model


def digest(file) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_chain_reaches_the_base_model_through_every_verb(one_rank, tmp_path):
    """convert, upcycle (twice), assemble, export and convert again; then the folders move and the rest is removed."""
    tiny_hf_model("llama").save_pretrained(tmp_path / "base")
    wanted = {name: digest(tmp_path / "base" / name) for name in ("config.json", "model.safetensors")}
    teacher = tmp_path / "teacher"
    convert_hf_to_megatron(tmp_path / "base", teacher, verify=False)
    layers = read_description(teacher)[0].num_hidden_layers
    for name, symbol in (("mla", "+"), ("gdn", "G")):
        upcycle_folder(UpcycleConfig(str(teacher), str(tmp_path / name), pattern=symbol * layers, init="paper", seed=3))
    pattern = "+" + "G" * (layers - 1)
    assemble_folder(tmp_path / "mla", tmp_path / "gdn", teacher, tmp_path / "hybrid", pattern)
    identity = content_identity(tmp_path / "mla")
    convert_megatron_to_hf(tmp_path / "hybrid", tmp_path / "hf", verify=False)
    convert_hf_to_megatron(tmp_path / "hf", tmp_path / "again", verify=False)
    made = made_by("train", {"model": tmp_path / "again", "teacher": "host:5000", "data": None}, stage="distil")
    for name in ("base", "teacher", "mla", "gdn", "hybrid", "hf", "again"):
        shutil.rmtree(tmp_path / name)

    assert [base["files"] for base in base_models(made)] == [wanted]
    assert made["inputs"]["teacher"] == {"path": "host:5000"} and "data" not in made["inputs"]
    exported = made["inputs"]["model"]["provenance"]["inputs"]["source"]["provenance"]
    assembled = exported["inputs"]["model"]["provenance"]
    assert (exported["verb"], assembled["verb"], assembled["pattern"]) == ("export", "assemble", pattern)
    mla = assembled["inputs"]["mla"]
    assert mla["content_sha256"] == identity and mla["provenance"]["seed"] == 3


def test_a_file_is_hashed_once_by_all_threads_and_again_when_it_changes(tmp_path, monkeypatch):
    """A hash begun ahead is waited for, not computed twice; a file that cannot be read fails where it is asked for alone."""
    read = []

    def slow(file):
        read.append(file.name)
        time.sleep(0.2)
        return digest(file)

    monkeypatch.setattr(provenance, "sha256", slow)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text(f"{name} {os.getpid()}")
    provenance.hash_ahead(tmp_path)
    while not read:
        time.sleep(0.01)
    found = made_by("convert", {"source": tmp_path})["inputs"]["source"]["files"]
    assert found == {file.name: digest(file) for file in tmp_path.iterdir()} and sorted(read) == sorted(found)
    (tmp_path / "config.json").write_text("another")
    found = made_by("convert", {"source": tmp_path})["inputs"]["source"]["files"]
    assert found["config.json"] == digest(tmp_path / "config.json") and len(read) == 3
    provenance.hash_ahead(tmp_path / "missing")
    with pytest.raises(FileNotFoundError):
        provenance.file_hash(tmp_path / "missing")
