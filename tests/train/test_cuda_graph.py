"""A captured step is the step: same losses and weights, for every stage, and across a stop and a resume."""

import shutil
from dataclasses import replace

import pytest
import torch

from megatron_hylo.config import ConfigError, ParallelConfig
from megatron_hylo.config.recall import RecallSettings
from megatron_hylo.config.train import OptimizerSettings
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.train import cuda_graph, setup
from megatron_hylo.train.loop import train
from megatron_hylo.train.optimizer import build_training_state
from tests.conftest import tiny_config
from tests.train.runs import metrics, relative_difference, weights

SETTINGS = OptimizerSettings(lr=2e-3, mixer_lr=4e-3, weight_decay=0.1, warmup_ratio=0.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_refused_without_a_gpu(settings):
    with pytest.raises(ConfigError, match="cuda_graphs needs a GPU"):
        train(settings(cuda_graphs=True))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(recompute=True), "recompute True"),
        (dict(packed_documents=True), "packed_documents"),
        (dict(recompute="G", packed_documents=True), "recompute G and packed_documents"),
        (dict(parallel=ParallelConfig(pipeline_model_parallel_size=2)), "2 pipeline stages"),
    ],
)
def test_what_cannot_be_captured_is_refused(settings, changes, named):
    with pytest.raises(ConfigError, match=f"cuda_graphs cannot capture {named}; set cuda_graphs false"):
        settings(cuda_graphs=True, **changes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    ("stage", "align_loss", "share", "optimizer"),
    [
        ("pretrain", "mse", 0.0, "adamw"),
        ("distil", "mse", 0.0, "adamw"),
        ("distil", "mse", 0.0, "muon"),
        ("align", "mse", 0.0, "adamw"),
        ("align", "ild", 0.0, "adamw"),
        ("align", "sequential", 0.0, "adamw"),
        ("pretrain", "mse", 0.6, "adamw"),
        ("distil", "mse", 0.6, "adamw"),
    ],
)
def test_captured_steps_equal_others(settings, tmp_path, monkeypatch, stage, align_loss, share, optimizer):
    """In fp32 and plain torch, where steps are all but reproducible; then a captured run is resumed half-way by an eager one,
    and the other way round.

    Transformer Engine's Adam that can be captured takes 1 - beta^step in fp32, its other one in fp64: the same kernel, never
    captured, is the oracle of the captured steps, and the two kernels are compared as well. Muon's update is never captured.
    """
    monkeypatch.setenv("HYLO_KERNELS", "attention=math,causal_conv1d=torch,gated_delta_rule=torch,ssd=torch")

    states = []
    monkeypatch.setattr(setup, "build_training_state", lambda *a: states.append(build_training_state(*a)) or states[-1])

    def run(name: str, graphs: bool, warm_up: int = 3) -> tuple[dict, dict, dict]:
        output = tmp_path / name
        if output.exists():
            shutil.rmtree(output / "model")  # step 6 is the newest that is left
        monkeypatch.setattr(cuda_graph, "WARM_UP", warm_up)
        states.clear()
        train(
            settings(
                stage,
                steps=12,
                output=output,
                cuda_graphs=graphs,
                align=dict(loss=align_loss),
                optimizer=replace(SETTINGS, name=optimizer, use_distributed_optimizer=optimizer == "adamw"),
                recall=RecallSettings(share),
                sequence_length=128 if share else 16,
                train_tokens=12 * 4 * (128 if share else 16),
                checkpoint=dict(save_interval=6),
            )
        )
        assert states[0].capturable <= (optimizer == "adamw")
        for group in states[0].optimizer.param_groups:
            assert isinstance(group["lr"], torch.Tensor) == states[0].capturable  # which the update reads
            assert float(group["lr"]) == pytest.approx(states[0].scheduler.get_lr(group), rel=1e-6)
        return metrics(output), metrics(output, "learning_rate_mixers"), weights(output / "model")

    uncaptured, captured, eager = run("uncaptured", True, warm_up=99), run("captured", True), run("eager", False)
    assert len(set(captured[0].values())) == len(set(captured[1].values())) == 12
    for found, truth, loss_limit, limit in (
        (captured, uncaptured, 1e-5, 1e-4),
        (captured, eager, 5e-4, 2e-3),
        (run("captured", False), eager, 5e-4, 2e-3),
        (run("eager", True), captured, 5e-4, 2e-3),
    ):
        assert found[0] == pytest.approx(truth[0], rel=loss_limit)
        assert found[1] == truth[1]
        difference, name = relative_difference(found[2], truth[2])
        assert difference < limit, name


def test_a_checkpoint_has_numbers_where_a_captured_update_has_tensors(settings, one_rank):
    model = build_model(tiny_config("G-*-")).train()
    state = build_training_state([model], settings("pretrain"))
    groups = state.optimizer.param_groups
    for i, group in enumerate(groups):
        group |= {"lr": torch.tensor(0.5 + i), "step": torch.tensor([3 + i], dtype=torch.int)}
    tensors = [(group["lr"], group["step"]) for group in groups]
    with state.portable():
        assert [(group["lr"], group["step"]) for group in groups] == [(0.5 + i, 3 + i) for i in range(len(groups))]
        for group in groups:
            group |= {"lr": group["lr"] / 2, "step": 7}
    assert all(group["lr"] is lr and group["step"] is step for group, (lr, step) in zip(groups, tensors))
    assert [(lr.item(), step.item()) for lr, step in tensors] == [((0.5 + i) / 2, 7) for i in range(len(groups))]
