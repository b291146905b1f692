"""Muon in a plan: its matrices, products, gathers and buffers, beside those of a real update."""

import weakref
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from megatron_hylo.config import ConfigError, ParallelConfig
from megatron_hylo.config.layer import Matrix
from megatron_hylo.config.layouts import get_layout
from megatron_hylo.config.train import AlignSettings, OptimizerSettings, TrainConfig
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.plan.communication import traffic
from megatron_hylo.plan.hardware import get_hardware
from megatron_hylo.plan.job import read_job
from megatron_hylo.plan.memory import estimate_memory, moments, predict_memory, update_bytes
from megatron_hylo.plan.muon import buffer_bytes, newton_schulz_flops, rank_matrices
from megatron_hylo.plan.parameters import trained_parameters
from megatron_hylo.plan.plan import assumptions, describe
from megatron_hylo.plan.rates import get_rates
from megatron_hylo.plan.search import predict
from megatron_hylo.train.muon import BatchedMuon
from megatron_hylo.train.optimizer import build_training_state, choose_trainable
from tests.conftest import EXPERTS, tiny_config
from tests.train.conftest import material, settings, tokenizer  # noqa: F401  fixtures

MUON = OptimizerSettings(name="muon", use_distributed_optimizer=False)
ALIGNED = dict(qk_layernorm=True, qk_head_dim=16, mla_bias=True)  # with `rotary_mix`
HYBRID = "llama3.2-1b-4mla12gdn"


class Peak(TorchDispatchMode):
    """Most bytes of tensors made in it that live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        for storage in (x.untyped_storage() for x in tree_iter(made) if isinstance(x, torch.Tensor)):
            key = storage._cdata
            if key not in self.sizes and key not in known:
                self.sizes[key] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, key)
        self.most = max(self.most, sum(self.sizes.values()))
        return made


def updated(model, config) -> BatchedMuon:
    """Muon of a model's matrices after one step, so that its state is there, with gradients for another."""
    choose_trainable([model], config)
    state = build_training_state([model], config)
    (part,) = [part for part in state.optimizer.chained_optimizers if isinstance(part.optimizer, BatchedMuon)]
    muon = part.optimizer
    for p in (p for group in muon.param_groups for p in group["params"]):
        p.grad = torch.randn_like(p)
    muon.step()
    return muon


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("pattern", "changes"),
    [
        ("G-+-M-*-", {}),
        ("K-+-W-K-", dict(mla_rotary_pairs=[[], [1, 1, 1], [], []], **ALIGNED)),
        ("M-G-*-*-", dict(trainable="mixers")),
        ("+-*-", dict(stage="align")),
        ("+-G-", dict(stage="align", align=AlignSettings("ild"))),
    ],
)
def test_matrices_and_products_are_those_that_torch_counts_in_an_update(settings, one_rank, pattern, changes, precision):  # noqa: F811
    of_run = {name: changes[name] for name in ("trainable", "align") if name in changes}
    shape = tiny_config(pattern, **{name: changes[name] for name in changes.keys() - of_run.keys() - {"stage"}})
    config = settings(changes.get("stage", "pretrain"), precision=precision, optimizer=MUON, **of_run)
    model = build_model(shape, params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32).train()
    muon = updated(model, config)
    its = [p for group in muon.param_groups for p in group["params"]]
    (matrices,) = rank_matrices(config, shape)
    assert matrices == Counter(Matrix(*p.shape, getattr(p, "partition_dim", -1) >= 0) for p in its)
    with FlopCounterMode(display=False) as counted:
        muon.step()
    assert newton_schulz_flops(matrices) == counted.get_total_flops() > 0
    state = sum(p.numel() for p in its)
    assert moments(config, shape) == 4 * state + 8 * (trained_parameters(config, shape) - state)
    assert predict_memory(config, [[model]], None, None, 1).optimizer == pytest.approx(
        estimate_memory(config, 1, [shape], []).optimizer, rel=0.05
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("together", [1, 2**26])
def test_the_buffers_are_those_that_live_in_an_update(settings, one_rank, monkeypatch, precision, together):  # noqa: F811
    for module in ("train", "plan"):
        monkeypatch.setattr(f"megatron_hylo.{module}.muon.TOGETHER", together)
    shape = tiny_config("G-G-+-*-M-")
    config = settings("pretrain", precision=precision, optimizer=MUON)
    muon = updated(build_model(shape, params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32).train(), config)
    with Peak() as peak:
        muon.step()
    assert peak.most == pytest.approx(update_bytes(config, shape), rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("divided", "part"), [(0, (40, 64)), (1, (80, 32)), (0, (12, 48)), (-1, (40, 64))])
def test_a_tensor_parallel_rank_computes_whole_matrices_and_has_buffers_for_them(monkeypatch, precision, divided, part):
    """One of two ranks, without the other: what it gathers is not looked at."""
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    monkeypatch.setattr(torch.distributed, "all_gather", lambda parts, own, group: [p.copy_(own) for p in parts])
    matrices = [torch.nn.Parameter(torch.randn(part)) for _ in range(3)]
    precise = "medium" if precision == "bf16" else "highest"
    muon = BatchedMuon(matrices, fp32_matmul_prec=precise, pg_collection=SimpleNamespace(tp=group, gtp_remat=None))
    for p in matrices:
        p.partition_dim, p.grad = divided, torch.randn_like(p)
    muon.step()
    rows, columns = (size * 2 if dimension == divided else size for dimension, size in enumerate(part))
    whole = {Matrix(rows, columns, divided >= 0): 3}
    with FlopCounterMode(display=False) as counted, Peak() as peak:
        muon.step()
    assert newton_schulz_flops(whole) == counted.get_total_flops()
    assert peak.most == pytest.approx(buffer_bytes(whole, 2, precision == "bf16"), rel=0.01)


def test_ranks_have_the_matrices_of_their_stages_whole_and_gather_them():
    shape = get_layout(HYBRID).config
    given = dict(stage="pretrain", data="-", output="-", scratch="-", optimizer=MUON, global_batch_size=16)
    whole, adamw = TrainConfig(**given), TrainConfig(**given | {"optimizer": OptimizerSettings()})
    (all_of_them,), (none,) = rank_matrices(whole, shape), rank_matrices(adamw, shape)
    assert not none and update_bytes(adamw, shape) == 0 and all_of_them[Matrix(2 * 8192, 2048)] == 16
    for parallel in (ParallelConfig(1, 4), ParallelConfig(1, 2, 2), ParallelConfig(2, 2)):
        stages = rank_matrices(replace(whole, parallel=parallel), shape)
        assert sum(stages, Counter()) == all_of_them and len(stages) == parallel.pipeline_model_parallel_size
    two = replace(whole, parallel=ParallelConfig(2))
    down = 4 * (1344 + 128 + 32) * 2048  # of MLA, which every rank has whole
    parameters = sum(count * one.rows * one.columns for one, count in all_of_them.items())
    more = traffic(two, 2, shape, None, 0.0).tensor - traffic(replace(adamw, parallel=two.parallel), 2, shape, None, 0.0).tensor
    assert more == 4 / 2 * (parameters - down)


def test_the_largest_moment_is_the_update_where_activations_are_smaller():
    shape = get_layout(HYBRID).config
    given = dict(stage="pretrain", data="-", output="-", scratch="-", optimizer=MUON, sequence_length=64, loss_chunk_tokens=1)
    config = TrainConfig(**given)
    assert update_bytes(config, shape) == 16 * 2**26, "two of an MLP's matrices, 16 bytes an element"
    one, adamw = (
        estimate_memory(c, 1, [shape], []) for c in (config, replace(config, optimizer=OptimizerSettings(name="adamw")))
    )
    assert adamw.kept + adamw.passing < 2**30 + 2**29 and one.gradients == adamw.gradients
    assert one.total - one.optimizer == pytest.approx(one.weights + one.gradients + max(2**30, adamw.kept + adamw.passing))
    assert buffer_bytes({Matrix(8, 4): 1}, 2, bf16=True) == 32 * (4 + 2 + 10)
    assert buffer_bytes({Matrix(8, 4): 1}, 2, bf16=False) == 32 * (4 + 2 + 16)


def test_a_plan_has_the_time_of_the_products():
    job, gpu, rates = read_job(HYBRID, "stage2_ctx8k"), get_hardware("h100-80gb"), get_rates()
    adamw = replace(job.config, parallel=ParallelConfig(2, sequence_parallel=True))
    muon = replace(adamw, optimizer=replace(adamw.optimizer, name="muon", use_distributed_optimizer=False))
    one, other = predict(job, muon, 8, gpu), predict(job, adamw, 8, gpu)
    (matrices,) = rank_matrices(muon, job.student)
    assert one.time.terms["muon"] == newton_schulz_flops(matrices) / (gpu.peak() * rates.products), "whole on each rank"
    assert other.time.terms["muon"] == 0 and one.time.flops == other.time.flops
    assert one.time.traffic.data / other.time.traffic.data == pytest.approx(8 / 6), "fp32 gradients are summed on every rank"
    said = describe(one, replace(job, config=muon), 8, gpu)
    assert said["seconds"]["muon"]["source"] == "ESTIMATED" and said["workspace_gib"]["update"] > 0
    assert any("Muon's update is not measured" in sentence for sentence in assumptions(replace(job, config=muon), gpu))
    stages = predict(job, replace(muon, parallel=ParallelConfig(1, 4)), 8, gpu).time.terms["muon"]
    assert 1 / 4 <= stages / one.time.terms["muon"] < 1 / 2, "of the stage that has most"
    moved = replace(muon, optimizer=replace(muon.optimizer, offload=True), parallel=ParallelConfig())
    state = moments(moved, job.student) + 4 * trained_parameters(moved, job.student)
    assert predict(job, moved, 1, gpu).time.terms["offload"] == pytest.approx(2 * state / (gpu.host_gb_s * 1e9 * rates.host))


def test_experts_are_refused():
    config = TrainConfig(stage="pretrain", data="-", output="-", scratch="-", optimizer=MUON)
    with pytest.raises(ConfigError, match="muon is not supported for mixtures of experts"):
        estimate_memory(config, 1, [tiny_config("GE", **EXPERTS)], [])
