"""A teacher or a student in FP8: what is refused before anything is written, and on a GPU runs with them."""

from pathlib import Path

import pytest
import torch

from megatron_hylo.config import ConfigError, ParallelConfig
from megatron_hylo.train.loop import train
from tests.train.runs import metrics


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(precision="fp32"), "precision bf16, got fp32"),
        (dict(backend="local"), "backend te or auto, got local"),
        (dict(sequence_length=20), "a sequence_length that is a multiple of 8 .8 tokens a rank., got 20"),
        (
            dict(sequence_length=24, parallel=ParallelConfig(context_parallel_size=2)),
            "a sequence_length that is a multiple of 16 .8 tokens a rank., got 24",
        ),
        (dict(teacher_store="store"), "a teacher on the student's ranks, got store to learn from"),
        (dict(teacher=None, teacher_address="host:1"), "a teacher on the student's ranks, got host:1 to learn from"),
        (dict(stage="pretrain"), r"a teacher, got none \(stage pretrain\)"),
    ],
)
def test_what_cannot_be_is_refused(settings, changes, sentence):
    fields = dict(precision="bf16") | changes
    with pytest.raises(
        ConfigError, match=f"teacher_precision fp8 needs {sentence}; change that, or set teacher_precision same"
    ):
        settings(teacher_precision="fp8", **fields)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(precision="fp32"), "precision bf16, got fp32"),
        (dict(sequence_length=24), "a sequence_length that is a multiple of 16 .16 tokens a rank., got 24"),
        (dict(cuda_graphs=True), "cuda_graphs false"),
    ],
)
def test_a_student_that_cannot_be_is_refused(settings, changes, sentence):
    with pytest.raises(ConfigError, match=f"linear_precision fp8 needs {sentence}; change that, or set linear_precision same"):
        settings(linear_precision="fp8", **dict(precision="bf16") | changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("which", ["linear_precision", "teacher_precision"])
def test_refused_without_a_gpu_before_the_run_folder_is_made(settings, which):
    config = settings(precision="bf16", **{which: "fp8"})
    with pytest.raises(ConfigError, match="fp8 needs a GPU"):
        train(config)
    assert not Path(config.output).exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("stage", ["distil", "align"])
def test_a_run_learns_from_it(settings, tmp_path, monkeypatch, stage, cuda_graphs):
    pytest.importorskip("transformer_engine.pytorch")
    monkeypatch.setenv("HYLO_KERNELS", "attention=math,causal_conv1d=torch,gated_delta_rule=torch,ssd=torch")
    runs = {}
    for teacher in ("same", "fp8"):
        config = settings(
            stage, steps=6, output=tmp_path / teacher, precision="bf16", backend="te", teacher_precision=teacher,
            cuda_graphs=cuda_graphs,
        )  # fmt: skip
        train(config)
        runs[teacher] = metrics(Path(config.output))
    assert runs["fp8"] != runs["same"]
    assert runs["fp8"] == pytest.approx(runs["same"], rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("stage", ["distil", "align"])
def test_a_student_is_trained_in_it(settings, suited, tmp_path, monkeypatch, stage):
    """Near the run in bf16; and a layer that computes again in the backward pass gives what one does that keeps its own."""
    pytest.importorskip("transformer_engine.pytorch")
    monkeypatch.setenv("HYLO_KERNELS", "attention=math,causal_conv1d=torch,gated_delta_rule=torch,ssd=torch")
    runs = {}
    for name, changes in (
        ("bf16", {}), ("fp8", dict(linear_precision="fp8")), ("recomputed", dict(linear_precision="fp8", recompute=True)),
    ):  # fmt: skip
        config = settings(stage, steps=6, output=tmp_path / name, precision="bf16", backend="te", **suited, **changes)
        train(config)
        runs[name] = [metrics(Path(config.output), metric) for metric in ("loss", "gradient_norm")]
    assert runs["fp8"] != runs["bf16"]
    if stage == "distil":
        assert runs["fp8"][0] == pytest.approx(runs["bf16"][0], rel=0.1)
    else:  # Adam's first step is as long for gradients that FP8 rounds to nothing as for any other in bf16: paths part there
        for ours, theirs in zip(runs["fp8"], runs["bf16"]):
            assert ours[1] == pytest.approx(theirs[1], rel=0.1)
        assert min(runs["fp8"][0].values()) < 0.8 * runs["fp8"][0][1]
    for kept, again in zip(runs["fp8"], runs["recomputed"]):
        assert again == pytest.approx(kept, rel=1e-2)
