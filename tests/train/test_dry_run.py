"""A dry run of every recipe, and of runs that would not start; its figures against models and checkpoints that exist."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_hylo.config.layouts import BASES, LAYOUTS
from megatron_hylo.data.documents import Document
from megatron_hylo.data.preprocess import build_dataset
from megatron_hylo.io import write_json
from megatron_hylo.models.checkpoint import describe, load_model
from megatron_hylo.plan.memory import estimate_memory, predict_memory
from megatron_hylo.train import dry_run as module
from megatron_hylo.train.dry_run import dry_run
from megatron_hylo.train.loop import train
from tests.slurm.test_slurm_scripts import RECIPES, load_recipe
from tests.slurm.tiny_root import byte_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Descriptions of models as large as the recipes', without weights, and text long enough for a window of each."""
    root = tmp_path_factory.mktemp("recipes")
    shapes = {"student": LAYOUTS["llama3.2-1b-4mla12gdn"].config, "1b": BASES["llama3.2-1b"], "8b": BASES["llama3.1-8b"]}
    for name, shape in shapes.items():
        (root / name).mkdir()
        write_json(root / name / "hylo.json", describe(shape, torch.bfloat16, {}))
    line = " ".join(f"{i} and {i + 1} are {2 * i + 1};" for i in range(20_000))
    build_dataset([Document("made", f"{i}.txt", line) for i in range(4)], byte_tokenizer(), root / "data", heldout_fraction=0.3)
    return root


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_every_recipe_can_start_with_its_models_on_eight_gpus(file, folders, tmp_path):
    config = replace(
        load_recipe(file), data=str(folders / "data"), output=str(tmp_path / "run"), model=str(folders / "student"),
        teacher=str(folders / ("1b" if "stage1" in file.stem else "8b")),
    )  # fmt: skip
    found = dry_run(config, ranks=8)
    wrong = {what: said for what, said, well in found.checks if not well and what != "disk"}
    assert not wrong
    assert found.plan["tokens"] >= config.train_tokens and 10 < found.plan["memory_gib"] < 80
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "ranks", "what", "words"),
    [
        ({"data": "/nowhere"}, 1, "text", "/nowhere"),
        ({"model": "/nowhere"}, 1, "models", "/nowhere is not a megatron_hylo model folder"),
        ({}, 3, "ranks", "global_batch_size 4 must be a multiple of micro_batch_size 2 x 3 data-parallel ranks"),
        ({"parallel": {"tensor_model_parallel_size": 4}}, 4, "ranks", "tensor_model_parallel_size 4 does not divide"),
        ({"parallel": {"pipeline_model_parallel_size": 2}}, 3, "ranks", "start a multiple of 2 ranks"),
        ({"cuda_graphs": True}, 2, "ranks", "cuda_graphs is for one GPU, got 2 ranks"),
        ({"sequence_length": 1_000_000}, 1, "text", "1000000"),
        ({"output": "/dev/null/run"}, 1, "run folder", "/dev/null"),
        ({"eval_data": ["/nowhere"]}, 1, "text", "/nowhere"),
    ],
)
def test_what_would_end_a_run_is_found(settings, changes, ranks, what, words):
    found = dry_run(settings("distil", **changes), ranks)
    wrong = {name: said for name, said, well in found.checks if not well}
    assert words in wrong.get(what, ""), wrong


def test_a_full_disk_is_found(settings, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda place: module.shutil._ntuple_diskusage(1, 1, 0))
    assert (
        "make room, set checkpoint.keep lower" in {w: said for w, said, well in dry_run(settings()).checks if not well}["disk"]
    )


@pytest.mark.parametrize("trainable", ["all", "mixers"])
def test_figures_agree_with_the_models_and_checkpoints_of_the_run(settings, material, trainable):
    config = settings("distil", trainable=trainable)
    found = dry_run(config, 1)
    student, teacher = load_model(material.student), load_model(material.teacher)
    if trainable == "mixers":
        for name, parameter in student.named_parameters():
            parameter.requires_grad = ".mixer." in name or ".self_attention." in name
    exact = predict_memory(config, [[student]], [teacher], None, 1)
    ours = estimate_memory(config, 1, [student.config.hylo], [teacher.config.hylo])
    for name in ("weights", "teacher", "kept", "passing"):
        assert getattr(ours, name) == pytest.approx(getattr(exact, name), rel=0.01), name
    train(config)
    newest = max(Path(config.output).glob("checkpoints/step_*"))
    size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()) / module.GIB
    assert (size * 0.5 < found.plan["checkpoint_gib"] + 0.01) and dry_run(config, 1).ok
    assert "already trained" in {what: said for what, said, _ in dry_run(config, 1).checks}["run folder"]
