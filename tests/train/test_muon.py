"""Muon beside AdamW: which parameters it has, its update, resuming, every parallelism.

Oracles: Muon written plainly (arXiv:2502.16982, Algorithm 1 with 0.2 sqrt(max(rows, columns))), and runs on one rank.
"""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon

from megatron_hylo.config import ConfigError, ParallelConfig
from megatron_hylo.config.train import OptimizerSettings
from megatron_hylo.models.checkpoint import save_model
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.plan.memory import estimate_memory, predict_memory
from megatron_hylo.train.gradient_norms import gradient_norms
from megatron_hylo.train.loop import train
from megatron_hylo.train.muon import BatchedMuon
from megatron_hylo.train.optimizer import allocate_optimizer_state, build_training_state, load_optimizer_state
from tests.conftest import EXPERTS, tiny_config
from tests.parity.worker import job, launch
from tests.train.conftest import VOCABULARY
from tests.train.runs import metrics, relative_difference, weights

MUON = OptimizerSettings(
    name="muon", use_distributed_optimizer=False, lr=2e-3, mixer_lr=4e-3, weight_decay=0.1, warmup_ratio=0.0, adam_eps=1e-3
)
ALIGNED = dict(qk_layernorm=True, qk_head_dim=16, mla_bias=True)  # with `rotary_mix`
NOT_ITS = ("norm", "conv1d", "bias", "A_log", ".D", "embedding", "output_layer", "rotary_mix")
COEFFICIENTS = (  # of five iterations, as in modded-nanogpt
    (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)  # fmt: skip
PARALLELISMS = {
    "dp2": {},
    "tp2": dict(tensor_model_parallel_size=2),
    "tp2_sp": dict(tensor_model_parallel_size=2, sequence_parallel=True),
    "cp2": dict(context_parallel_size=2),
    "pp2": dict(pipeline_model_parallel_size=2),
    "pp2_vp2": dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("pattern", ["G-M-*-", "K-+-W-"])
def test_it_has_the_matrices_of_mixers_and_mlps_alone(settings, one_rank, pattern, precision):
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    aligned = dict(ALIGNED, mla_rotary_pairs=[[], [1, 1, 1], []]) if "+" in pattern else {}
    model = build_model(tiny_config(pattern, **aligned), params_dtype=dtype).train()
    state = build_training_state([model], settings("pretrain", precision=precision, optimizer=MUON))
    names = {id(getattr(p, "main_param", p)): name for name, p in model.named_parameters()}
    seen = []
    for part in state.optimizer.chained_optimizers:
        muon = isinstance(part.optimizer, BatchedMuon)
        for group in part.param_groups:
            for name in (names[id(p)] for p in group["params"]):
                seen.append(name)
                assert muon == (not any(word in name for word in NOT_ITS)), name
                assert group["lr"] == (4e-3 if ".self_attention." in name else 2e-3), name
                decays = not ("norm" in name or name.endswith(("bias", "A_log", ".D")))
                assert group["weight_decay"] == (0.1 if decays else 0.0), name
    assert sorted(seen) == sorted(names.values())
    assert state.learning_rates() == {"rest": 2e-3, "mixers": 4e-3}
    assert len(state.optimizer.chained_optimizers) == (3 if precision == "bf16" else 2)


def plain_update(momentum: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz iterations of a momentum [rows, columns], scaled to AdamW's size."""
    x = momentum / momentum.norm()
    for a, b, c in COEFFICIENTS:
        square = x @ x.T
        x = a * x + b * square @ x + c * square @ square @ x
    return 0.2 * max(x.shape) ** 0.5 * x


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.02)])
def test_three_updates_equal_muon_written_plainly(settings, one_rank, precision, tolerance):
    """With weight decay, momentum, and gradients clipped with those of AdamW's parameters."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = build_model(tiny_config("G-+-M-*-"), params_dtype=dtype).train()
    optimizer = replace(MUON, weight_decay=1.0, min_lr_ratio=1.0)
    state = build_training_state([model], settings("pretrain", precision=precision, optimizer=optimizer))
    its = state.optimizer.chained_optimizers[0].param_groups
    found = {id(p): (p, group["lr"]) for group in its for p in group["params"]}
    copies = {key: p.detach().clone() for key, (p, _) in found.items()}
    means = {key: torch.zeros_like(copy) for key, copy in copies.items()}
    for _ in range(3):
        before = {key: p.detach().clone() for key, (p, _) in found.items()}
        gradients = {}
        for p in model.parameters():
            p.main_grad.normal_()
            gradients[id(getattr(p, "main_param", p))] = p.main_grad.clone()
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        assert float(torch.stack([*gradient_norms(state).values()]).norm()) == pytest.approx(float(norm), rel=1e-5)
        assert float(state.update()) == pytest.approx(float(norm), rel=1e-5)
        for key, (p, rate) in found.items():
            gradient = gradients[key] / norm
            means[key] = 0.95 * means[key] + 0.05 * gradient
            update = plain_update(0.05 * gradient + 0.95 * means[key])
            copies[key] = copies[key] * (1 - rate) - rate * update
            moved = (before[key] * (1 - rate) - p) / rate
            assert float(moved.square().mean().sqrt()) == pytest.approx(0.2, rel=0.02)  # AdamW's size, whatever the shape
            difference = (p - copies[key]).norm() / (rate * update.norm())
            assert difference < tolerance
    for p in model.parameters():
        assert torch.equal(p, getattr(p, "main_param", p).to(p.dtype))


@pytest.mark.parametrize("together", [1, 2**26])
def test_matrices_together_take_the_steps_of_each_alone(monkeypatch, together):
    """Megatron-Core's Muon, a matrix at a time, is the oracle; one product of a shape's matrices, or as many as fit."""
    monkeypatch.setattr("megatron_hylo.train.muon.TOGETHER", together)
    groups, calls = SimpleNamespace(tp=None, gtp_remat=None), 0
    settings = dict(lr=0.1, weight_decay=0.1, fp32_matmul_prec="highest", pg_collection=groups)
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((6, 4), (4, 6), (6, 4), (6, 4), (4, 6))]
    mine, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    ours, oracle = BatchedMuon(mine, **settings), TensorParallelMuon(theirs, **settings)
    orthogonalize = ours.scaled_orthogonalize_fn

    def counted(*given):
        nonlocal calls
        calls += 1
        return orthogonalize(*given)

    ours.scaled_orthogonalize_fn = counted
    for _ in range(3):
        for p, q in zip(mine, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        mine[3].grad = theirs[3].grad = None
        ours.step()
        oracle.step()
    for p, q in zip(mine, theirs):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert calls == 3 * (2 if together > 1 else 4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_predicted_state_is_what_there_is(settings, one_rank, precision):
    """To three per mille where architectures alone are known: all parameters have an fp32 copy then, fp32 ones too."""
    shape = tiny_config("G-+-M-*-")
    model = build_model(shape, params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32).train()
    config = settings("pretrain", precision=precision, optimizer=MUON)
    state = build_training_state([model], config)
    allocate_optimizer_state(state.optimizer)
    found, weights = 0, {p.data_ptr() for p in model.parameters()}
    for part in state.optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer)
        tensors = [x for values in part.optimizer.state.values() for x in values.values() if x.numel() > 1]
        copies = [p for group in part.param_groups for p in group["params"] if p.data_ptr() not in weights]
        found += sum(x.numel() * x.element_size() for x in (*tensors, *copies))
    assert predict_memory(config, [[model]], None, None, 1).optimizer == found
    assert estimate_memory(config, 1, [shape], []).optimizer == pytest.approx(found, rel=0.003)


def test_it_learns_from_the_same_start_as_adamw(settings, tmp_path):
    losses = {}
    for name in ("adamw", "muon"):
        distributed = name == "adamw"
        optimizer = OptimizerSettings(name=name, lr=2e-3, use_distributed_optimizer=distributed)
        train(settings("distil", steps=30, output=tmp_path / name, optimizer=optimizer))
        losses[name] = list(metrics(tmp_path / name).values())
    assert losses["muon"][0] == pytest.approx(losses["adamw"][0], rel=1e-6)
    means = {name: sum(values[-5:]) / 5 for name, values in losses.items()}
    assert max(means.values()) < 0.9 * losses["adamw"][0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_equals_an_undisturbed_one(settings, tmp_path, precision):
    """Also with the optimizer's state on the CPU between steps; another optimizer cannot go on with it."""
    configs = {
        name: settings(
            "pretrain", steps=4, output=tmp_path / name, precision=precision, checkpoint=dict(save_interval=2),
            optimizer=replace(MUON, offload=name == "resumed"),
        )
        for name in ("whole", "resumed")
    }  # fmt: skip
    train(configs["whole"])
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_00000002"
    shutil.copytree(checkpoint, tmp_path / "resumed" / "checkpoints" / checkpoint.name)
    train(configs["resumed"])
    mine, theirs = (weights(tmp_path / name / "checkpoints" / "step_00000004") for name in ("resumed", "whole"))
    assert mine.keys() == theirs.keys()
    tensors = [name for name, value in theirs.items() if isinstance(value, torch.Tensor)]
    assert all(torch.equal(mine[name], theirs[name]) for name in tensors)
    assert metrics(tmp_path / "resumed") == {step: loss for step, loss in metrics(tmp_path / "whole").items() if step > 2}
    if precision == "fp32":
        adamw = replace(MUON, name="adamw")
        with pytest.raises(ConfigError, match=r"was started with optimizer\.name = muon, now adamw"):
            train(replace(configs["whole"], optimizer=adamw, extend_tokens=128))
        kept = replace(configs["whole"], output=str(tmp_path / "kept"), model=str(checkpoint), keep_optimizer_state=True)
        with pytest.raises(ConfigError, match=r"a run with optimizer\.name: muon, this one has adamw"):
            train(replace(kept, optimizer=adamw))


@pytest.mark.multirank
def test_every_parallelism_equals_one_rank(settings, tmp_path):
    """The second half of the run from one rank's checkpoint; a tensor-parallel matrix is orthogonalised whole.

    In bf16, where a pipeline stage may have no parameter of a group, with its own checkpoint, to the last bit.
    """
    pairs = dict(mla_rotary_pairs=[[], [1, 1, 1], [], []])
    save_model(build_model(tiny_config("G-+-M-*-", vocab_size=VOCABULARY, **ALIGNED, **pairs)), tmp_path / "model")

    def config(name: str, groups: dict, precision: str = "fp32"):
        return settings(
            "pretrain", steps=5, output=tmp_path / name, model=str(tmp_path / "model"), micro_batch_size=1, optimizer=MUON,
            parallel=ParallelConfig(**groups), checkpoint=dict(save_interval=3), precision=precision,
        )  # fmt: skip

    def saved(name: str):
        return tmp_path / name / "checkpoints" / "step_00000003"

    train(config("whole", {}))
    jobs = []
    for name, groups in PARALLELISMS.items():
        jobs += [job("train", config(name, groups)), job("train", config(f"{name}_on", groups), saved("whole"))]
        jobs += [job("train", config(f"{name}_bf16", groups, "bf16"))]
        jobs += [job("train", config(f"{name}_bf16_on", groups, "bf16"), saved(f"{name}_bf16"))]
    launch(jobs, 2, tmp_path)
    whole = metrics(tmp_path / "whole")
    for name in PARALLELISMS:
        for run in (name, f"{name}_on"):
            assert metrics(tmp_path / run) == pytest.approx({s: whole[s] for s in metrics(tmp_path / run)}, rel=1e-5), run
            difference, where = relative_difference(weights(tmp_path / run / "model"), weights(tmp_path / "whole" / "model"))
            assert difference < 1e-5, f"{run}: {where}"
        mine, theirs = (weights(tmp_path / run / "model") for run in (f"{name}_bf16_on", f"{name}_bf16"))
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs), name


def test_a_group_takes_the_count_of_steps_that_another_has():
    """Transformer Engine's Adam has none for an empty one, as rank 0's, which are saved, may be under pipeline parallelism."""
    loaded = {"param_groups": [{"params": []}, {"params": [0], "step": 7}]}
    part = SimpleNamespace(param_groups=[{"lr": 1.0}, {"lr": 2.0}], optimizer=None, load_state_dict=lambda state: None)
    load_optimizer_state(SimpleNamespace(chained_optimizers=[part]), loaded)
    assert loaded["param_groups"] == [{"params": [], "lr": 1.0, "step": 7}, {"params": [0], "lr": 2.0, "step": 7}]


def test_what_does_not_work_is_refused(settings, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="optimizer.name muon needs optimizer.use_distributed_optimizer false"):
        settings("pretrain", optimizer=replace(MUON, use_distributed_optimizer=True))
    save_model(build_model(tiny_config("GE", vocab_size=VOCABULARY, **EXPERTS)), tmp_path / "experts")
    with pytest.raises(ConfigError, match="muon is not supported for mixtures of experts"):
        train(settings("pretrain", model=str(tmp_path / "experts"), optimizer=MUON))
    monkeypatch.setattr("megatron_hylo.train.muon.HAVE_EMERGING_OPTIMIZERS", False)
    with pytest.raises(ConfigError, match="needs the package emerging-optimizers: pip install"):
        train(settings("pretrain", optimizer=MUON))
