"""Predicted memory: exact where it counts a model, near the peaks of H100s where it estimates, loud where it will not fit."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_hylo.config import ModelConfig, ParallelConfig
from megatron_hylo.config.layouts import BASES, get_layout, parameter_count
from megatron_hylo.config.train import OptimizerSettings, TrainConfig
from megatron_hylo.models.checkpoint import load_model
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.plan.communication import traffic
from megatron_hylo.plan.memory import (
    AROUND,
    GIB,
    activation_parts,
    activations,
    estimate_memory,
    kept_numbers,
    predict_memory,
    update_bytes,
)
from megatron_hylo.plan.parameters import rank_parameters, trained_parameters
from megatron_hylo.train.loop import train
from megatron_hylo.train.optimizer import build_training_state, choose_trainable
from megatron_hylo.train.reporting import Reporter, peak_memory_gib
from tests.conftest import tiny_config
from tests.train.conftest import material, settings, tokenizer  # noqa: F401  fixtures


class Shape(nn.Module):
    """As many parameters as a model has, without memory."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config = SimpleNamespace(hylo=config)
        self.weight = nn.Parameter(torch.empty(parameter_count(config), dtype=torch.bfloat16, device="meta"))
        if dtype == torch.float8_e4m3fn:  # linear maps alone: the embedding and the head stay bf16
            outside = 2 * config.vocab_size * config.hidden_size
            self.outside = nn.Parameter(torch.empty(outside, dtype=torch.bfloat16, device="meta"))
            inside = torch.empty(parameter_count(config) - outside, dtype=dtype, device="meta")
            self.weight = nn.Parameter(inside, requires_grad=False)


HYBRID, MAMBA, SMALL = "llama3.2-1b-4mla12gdn", "llama3.2-1b-4mla12m2", "smollm2-135m-8mla22gdn-teacher"
HEAD = SimpleNamespace(head_weight=lambda: torch.empty(128_256, 4096, dtype=torch.bfloat16, device="meta"))


@pytest.mark.parametrize(
    ("layout", "teacher", "length", "batch", "ranks", "recompute", "peak"),  # peak GiB of an H100 or H200
    [
        (HYBRID, Shape(BASES["llama3.1-8b"]), 65_536, 1, 1, True, 59.8),
        (HYBRID, Shape(BASES["llama3.1-8b"], torch.float8_e4m3fn), 65_536, 1, 1, True, 53.3),
        (HYBRID, None, 65_536, 1, 1, True, 46.3),  # on other ranks
        (HYBRID, Shape(BASES["llama3.1-8b"]), 131_072, 1, 2, True, 50.1),
        (HYBRID, Shape(BASES["llama3.1-8b"]), 131_072, 1, 4, True, 40.6),
        (HYBRID, Shape(BASES["llama3.1-8b"]), 131_072, 1, 8, True, 36.0),
        (HYBRID, Shape(BASES["llama3.1-8b"]), 262_144, 1, 4, True, 49.5),
        (HYBRID, Shape(BASES["llama3.1-8b"], torch.float8_e4m3fn), 131_072, 1, 1, True, 70.0),
        ("llama3.2-3b-6mla22gdn", Shape(BASES["llama3.1-8b"]), 131_072, 1, 4, True, 70.8),
        (HYBRID, Shape(BASES["llama3.1-8b"]), 65_536, 1, 1, "GM-", 64.6),
        (HYBRID, Shape(BASES["llama3.1-8b"], torch.float8_e4m3fn), 65_536, 1, 1, "GM-", 57.7),
        (HYBRID, Shape(BASES["llama3.1-8b"]), 131_072, 1, 8, "GM-", 37.4),
        (HYBRID, Shape(BASES["llama3.1-8b"]), 131_072, 1, 4, "GM-", 43.4),
        ("llama3.2-3b-6mla22gdn", Shape(BASES["llama3.1-8b"]), 131_072, 1, 4, "GM-", 75.6),
        (MAMBA, Shape(BASES["llama3.1-8b"]), 65_536, 1, 1, "GM-", 62.0),
        (MAMBA, Shape(BASES["llama3.1-8b"]), 131_072, 1, 4, "GM-", 42.4),
        (SMALL, Shape(BASES["smollm2-135m"]), 2048, 8, 1, False, 17.0),
        (SMALL, Shape(BASES["smollm2-135m"]), 2048, 32, 1, False, 52.1),
    ],
)
def test_predictions_are_near_what_was_measured(layout, teacher, length, batch, ranks, recompute, peak):
    config = TrainConfig(
        "distil", "-", "-", model="-", teacher="-", sequence_length=length, global_batch_size=batch, micro_batch_size=batch,
        recompute=recompute, loss_chunk_tokens=4096, parallel=ParallelConfig(context_parallel_size=ranks),
    )  # fmt: skip
    student = Shape(get_layout(layout).config)
    found = predict_memory(config, [[student]], teacher and [teacher], None if teacher else HEAD, ranks)
    assert found.total / GIB == pytest.approx(peak, rel=0.06 if length == 262_144 else 0.05)


@pytest.mark.parametrize(("batch", "peak"), [(4, 10.9), (8, 16.5)])  # peak GiB of an H200, with the update captured or not
def test_a_captured_update_keeps_its_buffers_beside_the_activations(batch, peak):
    """Measured peaks count a graph's idle memory as free; the GPU must have it."""
    eager = TrainConfig(
        "distil", "-", "-", model="-", teacher="-", sequence_length=2048, global_batch_size=batch, micro_batch_size=batch,
        loss_chunk_tokens=4096, optimizer=OptimizerSettings(name="muon", use_distributed_optimizer=False),
    )  # fmt: skip
    captured, shape, base = replace(eager, cuda_graphs=True), get_layout(SMALL).config, BASES["smollm2-135m"]
    without, found = (estimate_memory(config, 1, [shape], [base]) for config in (eager, captured))
    assert found.allocated == without.total == without.allocated and found.allocated / GIB == pytest.approx(peak, rel=0.05)
    update = 16 * 30 * 2 * 1536 * 576  # bytes an element, layers, gate and up of an MLP
    assert (
        found.total - without.total == found.graphs == update and "graphs 0.8)" in str(found) and "graphs" not in str(without)
    )


@pytest.mark.parametrize(
    ("layout", "batch", "tensor", "buffer"),  # fp32 [splits, batch, tokens, heads, width], by hand
    [
        (HYBRID, 1, 1, 4 * 5 * 1 * 65_536 * 32 * 64),  # 132 / 32 heads -> 5
        (HYBRID, 1, 4, 4 * 17 * 1 * 65_536 * 8 * 64),  # 132 / 8 -> 17
        (HYBRID, 4, 1, 4 * 2 * 4 * 65_536 * 32 * 64),  # 132 / 128 -> 2
        (SMALL, 8, 1, 4 * 2 * 8 * 65_536 * 9 * 128),  # 132 / 72 -> 2; 48 + 64 channels -> 128
        (SMALL, 1, 1, 4 * 15 * 1 * 65_536 * 9 * 128),  # 132 / 9 -> 15
    ],
)
def test_deterministic_flash_attention_adds_up_in_splits(layout, batch, tensor, buffer):
    """Oracle: the buffer that torch's source allocates."""
    shape = get_layout(layout).config
    shape = shape.replace(hybrid_layer_pattern="+-" * shape.num_hidden_layers)
    config = TrainConfig(
        "pretrain", "-", "-", scratch="-", sequence_length=65_536, micro_batch_size=batch, global_batch_size=batch,
        recompute=True, parallel=ParallelConfig(tensor_model_parallel_size=tensor),
    )  # fmt: skip
    usual, exact = (activation_parts(replace(config, deterministic=on), shape, None)[1]["layer"] for on in (False, True))
    mla = 2 * batch * 65_536 * (2 * kept_numbers(shape, "+", tensor) + AROUND * shape.hidden_size)  # without the buffer, bf16
    assert usual >= mla and exact == pytest.approx(max(usual, mla + buffer))  # MLPs may need more
    fp32 = replace(config, precision="fp32", deterministic=True)
    assert activation_parts(fp32, shape, None) == activation_parts(replace(fp32, deterministic=False), shape, None)


def test_graphs_keep_the_activations_where_the_update_is_the_fuller_moment(one_rank):
    muon = OptimizerSettings(name="muon", use_distributed_optimizer=False)
    eager = TrainConfig("pretrain", "-", "-", scratch="-", sequence_length=64, loss_chunk_tokens=1, optimizer=muon)
    shape = get_layout(HYBRID).config.replace(vocab_size=1024)
    for config in (eager, replace(eager, optimizer=replace(muon, offload=True))):
        without, found = (estimate_memory(replace(config, cuda_graphs=graphs), 1, [shape], []) for graphs in (False, True))
        assert without.passing == 2**30 and replace(found, graphs=0.0) == without
        assert found.graphs == sum(activations(config, shape, None)) > 0, "with its state offloaded the update is not captured"
    adamw = replace(eager, optimizer=OptimizerSettings(), cuda_graphs=True)
    assert estimate_memory(adamw, 1, [shape], []).graphs == 0, "its update has no buffers"
    model = build_model(tiny_config("G-*-"), params_dtype=torch.bfloat16)
    pair = replace(eager, stage="align", scratch=None, model="-", second_model="-", teacher="-", cuda_graphs=True)
    choose_trainable([model], pair)
    one, two = (predict_memory(pair, [[model]] * count, None, None, 1) for count in (1, 2))
    assert two.graphs - one.graphs == pytest.approx(update_bytes(pair, model.config.hylo)), "a graph for each student's update"


@pytest.mark.parametrize(
    ("layout", "mixer", "length", "rest", "peak"),  # GiB of weights, gradients, optimizer state, teacher; peak of an H200
    [
        (HYBRID, "G", 131_072, 11.5, 31.5), (HYBRID, "G", 262_144, 11.5, 51.2), (MAMBA, "M", 262_144, 8.7, 48.0),
    ],
)  # fmt: skip
def test_predictions_of_stage_1(layout, mixer, length, rest, peak):
    config = TrainConfig(
        "align", "-", "-", model="-", teacher="-", sequence_length=length, global_batch_size=1, micro_batch_size=1
    )
    student = get_layout(layout).config.replace(hybrid_layer_pattern=f"{mixer}-" * 16)
    found = activations(config, student, BASES["llama3.2-1b"])
    assert rest + sum(found) / GIB == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize(
    ("stage", "teacher", "offload", "recompute", "peak"),
    [
        ("distil", Shape(BASES["llama3.1-8b"]), True, True, 43.2),
        ("pretrain", None, False, True, 44.8),
        ("pretrain", None, False, "G-", 49.6),
        ("pretrain", None, False, "-", 81.9),
    ],
)
def test_predictions_without_a_teacher_and_with_the_optimizer_offloaded(stage, teacher, offload, recompute, peak):
    """65,536 tokens on an H200."""
    config = TrainConfig(
        stage, "-", "-", model="-", teacher=teacher and "-", sequence_length=65_536, global_batch_size=1,
        recompute=recompute, loss_chunk_tokens=4096, optimizer=OptimizerSettings(offload=offload),
    )  # fmt: skip
    found = predict_memory(config, [[Shape(get_layout(HYBRID).config)]], teacher and [teacher], None, 1)
    assert found.total / GIB == pytest.approx(peak, rel=0.1 if recompute == "-" else 0.05)


@pytest.mark.parametrize("stage", ["pretrain", "distil", "align"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_a_model_takes_is_exact(settings, stage, precision, one_rank):  # noqa: F811
    config = settings(stage, precision=precision, trainable="mixers" if stage == "align" else "all")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    student, teacher = (load_model(folder, params_dtype=dtype) for folder in (config.model, config.teacher or config.model))
    choose_trainable([student], config)
    state = build_training_state([student.train()], config)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.main_grad.fill_(1e-3)
    state.optimizer.step()
    online = None if stage == "pretrain" else [teacher]
    found = predict_memory(config, [[student]], online, None, 1)
    assert found.weights == sum(p.numel() * p.element_size() for p in student.parameters())
    assert found.teacher == (0 if online is None else sum(p.numel() * p.element_size() for p in teacher.parameters()))
    buffers = [buffer.grad_data for buffer in state.wrapped[0].buffers]
    assert found.gradients == pytest.approx(sum(x.numel() * x.element_size() for x in buffers), rel=0.02)  # they are padded
    held = [x for inner in _adams(state.optimizer) for x in _tensors(inner)]
    assert found.optimizer == pytest.approx(sum(x.numel() * x.element_size() for x in held), rel=0.02)
    assert found.kept > 0 and found.passing > 0 and f"{found.total / GIB:.1f} GiB (weights" in str(found)


def _adams(optimizer) -> list[torch.optim.Optimizer]:
    """torch's optimizers inside Megatron-Core's."""
    return [inner.optimizer for inner in getattr(optimizer, "chained_optimizers", [optimizer])]


def _tensors(adam: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Moments, and the fp32 copies of parameters that are not fp32 in the model (those that are, are the model's own)."""
    moments = [x for entry in adam.state.values() for x in entry.values() if isinstance(x, torch.Tensor) and x.numel() > 1]
    copies = [p for group in adam.param_groups for p in group["params"] if p._base is None and not hasattr(p, "main_grad")]
    return moments + copies


def test_a_gpu_that_is_too_small_is_told(settings, monkeypatch, caplog, capsys, one_rank):  # noqa: F811
    small = SimpleNamespace(total_memory=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: small)
    made = Reporter.__init__

    def with_prediction(self, config, *rest):
        made(self, config, *rest)
        self.predict(replace(predict_memory(config, [[load_model(config.model)]], None, None, 1), graphs=3 * GIB))

    monkeypatch.setattr(Reporter, "__init__", with_prediction)
    with caplog.at_level("WARNING", logger="megatron_hylo.train"):
        train(settings("pretrain", steps=1))
    assert "will hardly fit into the 0 of this GPU" in caplog.text
    shown = " ".join(capsys.readouterr().err.split())
    assert "memory of a GPU, predicted: 3.0 GiB (weights" in shown and "graphs 3.0)" in shown
    assert "GiB, predicted 0.0" in shown, "beside the peak, which does not count what graphs reserve"


def test_a_run_records_no_peak_of_the_one_before_it_in_the_process(settings, monkeypatch, tmp_path, one_rank):  # noqa: F811
    """A stage of `hylo sweep` that needs less than the one before would look as large."""
    device, peak = torch.device("cuda"), [5 * 2**30]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: peak.__setitem__(0, 2**30))
    monkeypatch.setattr("megatron_hylo.train.reporting.peak_flops", lambda _: (1.0, "made up"))
    Reporter(settings("pretrain"), tmp_path / "run", device, 1.0, 0).close()
    assert peak_memory_gib(device) == 1.0


def test_expert_parallel_ranks_have_a_part_of_the_experts_and_of_all_optimizer_state():
    layout = get_layout("qwen3-30b-a3b-12mla36gdn").config
    experts = 48 * 128 * 3 * 2048 * 768

    def run(**changes):
        return TrainConfig(
            "pretrain",
            "-",
            "-",
            scratch="-",
            global_batch_size=8,
            parallel=ParallelConfig(expert_model_parallel_size=8),
            **changes,
        )

    config = run()
    total = parameter_count(layout)
    assert rank_parameters(config, layout) == total - experts + experts / 8
    found = estimate_memory(config, 8, [layout], [layout])
    assert found.weights == 2 * (total - experts + experts / 8) and found.optimizer == pytest.approx(12 * total / 8)
    assert found.teacher == pytest.approx(2 * (total - experts + experts / 8), rel=1e-3)  # without norms
    mixers = run(trainable="mixers")
    assert rank_parameters(mixers, layout, trained=True) == pytest.approx(trained_parameters(mixers, layout))
    moved = traffic(config, 8, layout, None, total).expert
    assert moved == 48 * 2 * 2 * (7 / 8 * config.sequence_length * 8 * 2048 * 2)  # there and back, forward and backward
