"""Runs that start from a Hugging Face folder, against runs from the model folders that it was converted from or to."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_hylo.config import ConfigError
from megatron_hylo.config.tensor_names import tensor_names
from megatron_hylo.convert import hf_start
from megatron_hylo.convert.folder_source import FolderSource
from megatron_hylo.convert.hf_start import _EntryReader, load_model_chunks
from megatron_hylo.convert.mapping import model_entries
from megatron_hylo.convert.safetensors_reader import SafetensorsSource
from megatron_hylo.convert.to_hf import convert_megatron_to_hf
from megatron_hylo.eval.runs import read_run
from megatron_hylo.models.description import read_description
from megatron_hylo.plan.job import shape
from megatron_hylo.train.checkpoint import latest_checkpoint
from megatron_hylo.train.dry_run import dry_run
from megatron_hylo.train.loop import train
from megatron_hylo.train.suite_evaluation import tokenizer_folder
from tests.convert.quantised_folders import float8, quantise_folder
from tests.train.runs import metrics, weights

SHARD = 100_000  # bytes: several files each


@pytest.fixture(scope="module")
def folders(material, tmp_path_factory) -> SimpleNamespace:
    """Hugging Face folders of `teacher` and `student` of the tests' material, without a manifest, as others write them."""
    root = tmp_path_factory.mktemp("hf_start")
    for name in ("teacher", "student"):
        convert_megatron_to_hf(getattr(material, name), root / name, verify=False, shard_bytes=SHARD)
        for ours in ("manifest.json", "tensors.json", "hylo_provenance.json"):
            (root / name / ours).unlink()
        assert len(list((root / name).glob("*.safetensors"))) > 2
    return SimpleNamespace(teacher=root / "teacher", student=root / "student")


@pytest.fixture
def own(folders, tmp_path) -> Path:
    """A copy of the teacher's folder, to change."""
    return Path(shutil.copytree(folders.teacher, tmp_path / "own"))


def test_a_run_from_hugging_face_folders_is_that_from_model_folders(settings, folders, tmp_path):
    """Losses, gradient norms, held-out measures and the optimizer's state are equal, bit for bit, after a resume as well."""
    both = dict(model=f"hf:{folders.student}", teacher=f"hf:{folders.teacher}")
    saving = dict(save_interval=2, keep=2)
    train(settings(steps=4, output=tmp_path / "folders", eval_interval=2, checkpoint=saving))
    config = settings(steps=4, eval_interval=2, checkpoint=saving, **both)
    plan = dry_run(config)
    assert plan.ok, plan.checks
    run = Path(config.output)
    train(config)
    for name in ("loss", "gradient_norm", "heldout_kl", "heldout_perplexity"):
        assert metrics(run, name) == metrics(tmp_path / "folders", name)
    mine, theirs = weights(latest_checkpoint(run)), weights(latest_checkpoint(tmp_path / "folders"))
    tensors = [name for name in mine if isinstance(mine[name], torch.Tensor)]
    assert mine.keys() == theirs.keys() and any("exp_avg" in name for name in tensors)
    assert all(torch.equal(mine[name], theirs[name]) for name in tensors)
    first = metrics(run)
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    train(config)
    assert metrics(run) == first


def test_the_run_keeps_where_it_comes_from_and_the_tokenizer(settings, folders):
    config = settings("pretrain", steps=1, model=f"hf:{folders.teacher}")
    train(config)
    model = Path(config.output) / "model"
    source = read_description(model)[1]["provenance"]["inputs"]["model"]
    files = sorted(path.name for path in folders.teacher.glob("*.safetensors"))
    assert source["path"] == str(folders.teacher) and set(files) < set(source["files"])
    generation = model / "tokenizer" / "generation_config.json"
    vocabulary = [json.loads((f / "tokenizer.json").read_text())["model"] for f in (model / "tokenizer", folders.teacher)]
    assert vocabulary[0] == vocabulary[1]
    ends = [json.loads(file.read_text())["eos_token_id"] for file in (generation, folders.teacher / "config.json")]
    assert ends[0] == ends[1] is not None
    assert tokenizer_folder(config) == Path(config.output) / "tokenizer"  # of suites
    assert shape(config.model).mixers == "****"  # in `hylo plan`
    assert read_run(Path(config.output), "run").config["model"] == f"hf:{folders.teacher}"


def test_a_part_of_a_parameter_is_read_without_the_rest(folders, material, monkeypatch):
    """Any half of any parameter equals that half in the model folder; halves of rows read half of the bytes."""
    monkeypatch.setattr(hf_start, "BLOCK_BYTES", 1000)  # several rows, fewer than a tensor has
    read: list[int] = []
    plain = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *given: read.append(plain(*given)) or read[-1])
    for name in ("teacher", "student"):
        source = SafetensorsSource(getattr(folders, name))
        wanted, shapes = FolderSource(getattr(material, name)), tensor_names(source.config)
        for entry in model_entries(source.config):
            whole = wanted.parameter(entry.megatron)
            reader = _EntryReader(source, entry, shapes, {"part": 0})
            for axis, size in enumerate(whole.shape[:2]):
                for start, end in ((0, size // 2), (size // 2, size)):
                    part = tuple(slice(start, end) if i == axis else slice(None) for i in range(whole.dim()))
                    read.clear()
                    offsets = tuple(start if i == axis else 0 for i in range(whole.dim()))
                    assert torch.equal(reader.read("part", offsets, tuple(whole[part].shape)), whole[part]), entry.megatron
                    assert axis or sum(read) == whole[part].nbytes


def test_a_quantised_folder_is_dequantised(material, tmp_path):
    """Weights are value x scale by the formula of the test, in the run's dtype."""
    own = tmp_path / "one_file"
    convert_megatron_to_hf(material.teacher, own, verify=False)
    (own / "manifest.json").unlink()
    blocks = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    right = quantise_folder(own, float8("weight_scale_inv", block=(16, 16)), blocks)
    (chunk,) = load_model_chunks(f"hf:{own}", None, torch.bfloat16)
    parameters = dict(chunk.named_parameters())
    for entry in model_entries(chunk.config.hylo):
        wanted = entry.merge([right[name] for name in entry.hugging_face]).to(torch.bfloat16)
        assert torch.equal(parameters[entry.megatron], wanted), entry.megatron


def test_what_cannot_be_read_is_refused_before_training(settings, own, folders, material, tmp_path):
    shard = sorted(own.glob("*.safetensors"))[1]

    def refused(words: str, **changes: str) -> None:
        config = settings(output=tmp_path / "refused", **changes)
        with pytest.raises(ConfigError, match=words):
            train(config)
        assert not dry_run(config).ok and not (tmp_path / "refused" / "model").exists()

    refused("hf:meta-llama/Llama-3.2-1B: there is no such folder.*downloads nothing", model="hf:meta-llama/Llama-3.2-1B")
    refused("is a model folder of megatron_hylo; give .* without hf:", model=f"hf:{material.student}")
    refused("a Hugging Face folder is read by `hylo train` as hf:", model=str(folders.student))
    weight = load_file(shard)
    save_file({k: v.to(torch.float8_e4m3fn) if v.dim() == 2 else v for k, v in weight.items()}, shard)
    refused("stored as F8_E4M3, but neither config.json .* says how it was quantised", teacher=f"hf:{own}")
    shard.unlink()
    refused(f"{shard.name} is missing", teacher=f"hf:{own}")
    with pytest.raises(ConfigError, match="teacher_store store knows its teacher by the model folder"):
        settings(teacher=f"hf:{own}", teacher_store="store")


def test_a_folder_that_changed_is_not_taken_for_the_one_a_run_was_started_with(settings, own, folders, tmp_path):
    config = settings(steps=2, teacher=f"hf:{own}", checkpoint=dict(save_interval=1))
    train(config)
    shutil.rmtree(Path(config.output) / "model")
    again = replace(config, train_tokens=config.train_tokens * 2)
    shutil.copytree(own, tmp_path / "elsewhere")
    train(replace(again, teacher=f"hf:{tmp_path / 'elsewhere'}"))
    shutil.rmtree(Path(config.output) / "model")
    shard = next(own.glob("*.safetensors"))
    values = load_file(shard)
    next(iter(values.values())).view(-1)[0] += 1e-3
    save_file(values, shard)
    with pytest.raises(ConfigError, match=r"was started with teacher = hf:.*content .* now .*--allow_change teacher"):
        train(again)


def test_a_tensor_that_is_no_number_ends_the_start(own):
    shard = sorted(own.glob("*.safetensors"))[-1]
    values = load_file(shard)
    next(iter(values.values())).view(-1)[-1] = float("nan")
    save_file(values, shard)
    with pytest.raises(ConfigError, match="holds NaN or infinite values"):
        load_model_chunks(f"hf:{own}", None, torch.float32)
