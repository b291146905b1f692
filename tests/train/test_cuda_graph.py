"""A captured step is the step: same losses and weights, for every stage, and across a stop and a resume.

The code that a GPU captures is run uncaptured on the CPU too: nothing in an update may depend on a number that Python has.
"""

import contextlib
import shutil
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_hylo.cli import train as cli
from megatron_hylo.config import ConfigError, ParallelConfig
from megatron_hylo.config.recall import RecallSettings
from megatron_hylo.config.train import OptimizerSettings
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.train import checkpoint, cuda_graph, loop, multi_tensor, setup
from megatron_hylo.train.cuda_graph import Captured, capturing
from megatron_hylo.train.loop import train
from megatron_hylo.train.optimizer import build_training_state, optimizer_parts
from tests.conftest import tiny_config
from tests.train.runs import metrics, relative_difference, weights

SETTINGS = OptimizerSettings(lr=2e-3, mixer_lr=4e-3, weight_decay=0.1, warmup_ratio=0.0)


ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


@ON_CPU
def test_refused_without_a_gpu(settings):
    with pytest.raises(ConfigError, match="cuda_graphs needs a GPU"):
        train(settings(cuda_graphs=True))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(recompute=True), "recompute True"),
        (dict(packed_documents=True), "packed_documents"),
        (dict(recompute="G", packed_documents=True), "recompute G and packed_documents"),
    ],
)
def test_what_cannot_be_captured_is_refused(settings, changes, named):
    with pytest.raises(ConfigError, match=f"cuda_graphs cannot capture {named}; set cuda_graphs false"):
        settings(cuda_graphs=True, **changes)


@pytest.mark.parametrize("name", ["tensor", "pipeline", "context", "expert"])
def test_several_ranks_are_refused_by_their_parallel_size(settings, name):
    key = f"{name}_parallel_size" if name == "context" else f"{name}_model_parallel_size"
    with pytest.raises(
        ConfigError, match=f"is for one GPU, got parallel.{key} 2: .*; set cuda_graphs false, or train on one GPU"
    ):
        settings(cuda_graphs=True, parallel=ParallelConfig(**{key: 2}))
    settings(parallel=ParallelConfig(**{key: 2})).check_graphs(4)


def test_data_parallel_ranks_are_refused_wherever_their_number_is_known(settings, one_rank, monkeypatch):
    config, said = settings(cuda_graphs=True), "cuda_graphs is for one GPU, got 2 ranks: .*; set cuda_graphs false"
    config.check_graphs(1)
    with pytest.raises(ConfigError, match=said):
        config.check_graphs(2)
    with monkeypatch.context() as launched:
        launched.setenv("WORLD_SIZE", "2")  # of torchrun, before PyTorch is imported
        with pytest.raises(ConfigError, match=said):
            cli.train(config)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *group: 2)
    monkeypatch.setattr(loop, "capturing", lambda *given: contextlib.nullcontext())
    with pytest.raises(ConfigError, match=said):
        train(config)


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
    captured, is the oracle of the captured steps, and the two kernels are compared as well.
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
        assert states[0].capturable == graphs
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


UPDATES = pytest.mark.parametrize(
    ("name", "precision", "distributed"),
    [
        ("adamw", "fp32", True),
        ("adamw", "bf16", True),
        ("adamw", "fp32", False),
        ("muon", "fp32", False),
        ("muon", "bf16", False),
    ],
)


def training_state(settings, device, graphs, name, precision, distributed):
    """Return a state of random weights, the same ones at each call."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = build_model(tiny_config("G-+-M-*-"), params_dtype=dtype).to(device).train()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator))
    optimizer = replace(SETTINGS, name=name, use_distributed_optimizer=distributed, adam_eps=1e-3, clip_grad=0.5)
    return build_training_state([model], settings("pretrain", precision=precision, optimizer=optimizer, cuda_graphs=graphs))


def updates(state, numbers):
    """Take an update for each number, which is the seed of its gradients; returns the norms of these."""
    norms = []
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for p in state.chunks[0].parameters():
            p.main_grad.copy_(torch.randn(p.shape, generator=generator))
        norms.append(float(state.update()))
        state.scheduler.step(1)
        state.optimizer.zero_grad()
    return norms


def tensors(state):
    """All that an update changes, by name: weights, fp32 copies, moments, learning rates."""
    found = dict(state.chunks[0].named_parameters())
    for i, part in enumerate(optimizer_parts(state.optimizer)):
        for j, group in enumerate(part.param_groups):
            found |= {f"{i}.{j}.lr": group["lr"]} | {f"{i}.{j}.{k}": p for k, p in enumerate(group["params"])}
            for k, p in enumerate(group["params"]):
                found |= {f"{i}.{j}.{k}.{name}": x for name, x in part.optimizer.state[p].items()}
    return found


class Reads(TorchDispatchMode):
    """Records operators, their numbers and which tensors are at one of `places`; refuses to read a tensor's number."""

    def __init__(self, places):
        super().__init__()
        self.places, self.calls = places, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), "a captured update cannot wait for a number"
        given = []
        for x in tree_leaves((args, kwargs or {})):
            if isinstance(x, torch.Tensor):
                given.append((x.shape, x.data_ptr() if x.data_ptr() in self.places else None))
            elif isinstance(x, int | float):
                given.append(x)
        self.calls.append((str(func), given))
        return func(*args, **(kwargs or {}))


@ON_CPU
@UPDATES
def test_an_update_reads_what_changes_from_tensors_that_stay(settings, one_rank, monkeypatch, name, precision, distributed):
    """Updates at two rates are the same operators with the same numbers on the same tensors, so a graph of one is the other."""
    monkeypatch.setattr(multi_tensor, "FUSED_ON", ("cpu",))
    state = training_state(settings, one_rank, True, name, precision, distributed)
    assert state.capturable
    updates(state, range(2))
    kept = tensors(state)
    places = {x.data_ptr() for x in kept.values()} | {p.main_grad.data_ptr() for p in state.chunks[0].parameters()}
    rates, recorded = [], []
    for number in (2, 3):
        rates.append({key: float(x) for key, x in kept.items() if key.endswith(".lr")})
        for p in state.chunks[0].parameters():
            p.main_grad.fill_(number)
        with Reads(places) as reads:
            state.update()
        recorded.append(reads.calls)
        state.scheduler.step(1)
        with state.portable():  # a checkpoint between two steps leaves them where they are
            checkpoint._sharded_state(state, loading=False)
    assert all(rates[1][key] != rate for key, rate in rates[0].items())
    assert recorded[0] == recorded[1] and len(recorded[0]) > 20
    assert all(x is kept[key] for key, x in tensors(state).items())


@ON_CPU
@UPDATES
def test_an_update_that_can_be_captured_equals_the_other(settings, one_rank, monkeypatch, name, precision, distributed):
    """Muon's to the last bit, AdamW's by the rounding of its learning rate to fp32."""
    monkeypatch.setattr(multi_tensor, "FUSED_ON", ("cpu",))
    states = [training_state(settings, one_rank, graphs, name, precision, distributed) for graphs in (True, False)]
    norms = [updates(state, range(4)) for state in states]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    mine, theirs = map(tensors, states)
    for key, x in theirs.items():
        if key.endswith(".lr"):
            assert float(mine[key]) == pytest.approx(x, rel=1e-7)
        else:
            torch.testing.assert_close(mine[key], x, rtol=1e-2 if x.dtype == torch.bfloat16 else 1e-6, atol=1e-8)
    if name == "muon":  # the first part
        groups = [optimizer_parts(state.optimizer)[0].param_groups for state in states]
        for group, other in zip(*groups, strict=True):
            assert group["params"] and all(map(torch.equal, group["params"], other["params"]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@UPDATES
def test_a_captured_update_equals_the_same_one_uncaptured(settings, one_rank, name, precision, distributed):
    with capturing(True, one_rank):
        states = [training_state(settings, one_rank, True, name, precision, distributed) for _ in range(2)]
        states[0].take_step = captured = Captured(states[0].take_step, "update")
        norms = [updates(state, range(8)) for state in states]
    assert captured.graph is not None and norms[0] == pytest.approx(norms[1], rel=1e-6)
    mine, theirs = map(tensors, states)
    for key, x in theirs.items():  # a rate that stays as captured makes 1.3e-3
        difference = (mine[key].float() - x.float()).norm() / x.float().norm().clamp(min=1e-30)
        assert difference < (1e-3 if x.dtype == torch.bfloat16 else 2e-5), key


@ON_CPU
@pytest.mark.parametrize(("name", "distributed"), [("adamw", True), ("muon", False)])
def test_a_run_whose_update_can_be_captured_is_the_run(settings, tmp_path, monkeypatch, name, distributed):
    """Uncaptured, on the CPU; either run goes on from the other's checkpoint."""
    monkeypatch.setattr(multi_tensor, "FUSED_ON", ("cpu",))
    monkeypatch.setattr(loop, "capturing", lambda *given: contextlib.nullcontext())
    monkeypatch.setattr(cuda_graph, "WARM_UP", 99)
    states = []
    monkeypatch.setattr(setup, "build_training_state", lambda *a: states.append(build_training_state(*a)) or states[-1])
    optimizer = replace(SETTINGS, name=name, use_distributed_optimizer=distributed, adam_eps=1e-3)

    def run(output: str, graphs: bool, start: str | None = None):
        if start:
            step = "checkpoints/step_00000002"
            shutil.copytree(tmp_path / start / step, tmp_path / output / step)
        config = settings(
            "pretrain", 4, tmp_path / output, optimizer=optimizer, cuda_graphs=graphs, checkpoint=dict(save_interval=2)
        )
        train(config)
        assert states[-1].capturable == graphs
        said = (tmp_path / output / "log.txt").read_text()
        assert ("1 rank, CUDA graphs of passes and update" in said) == graphs
        found = (
            metrics(tmp_path / output, key) for key in ("loss", "gradient_norm", "learning_rate_mixers", "learning_rate_rest")
        )
        return (*found, weights(tmp_path / output / "checkpoints" / "step_00000004"))

    runs = {graphs: run(f"graphs_{graphs}", graphs) for graphs in (True, False)}
    for graphs in (True, False):
        for start in (True, False):
            losses, norms, mixers, rest, found = run(f"{graphs}_from_{start}", graphs, f"graphs_{start}")
            assert list(losses) == [3, 4] and len(set(mixers.values()) | set(rest.values())) == 4
            for mine, theirs in zip((losses, norms, mixers, rest), runs[start]):
                assert mine == pytest.approx({step: theirs[step] for step in mine}, rel=1e-6)
            for key, x in runs[start][-1].items():
                if isinstance(x, torch.Tensor):
                    assert torch.allclose(found[key], x, rtol=1e-5, atol=1e-7), key
                    assert start != graphs or torch.equal(found[key], x), key


def test_offloaded_state_is_not_captured(settings, one_rank):
    config = settings("pretrain", cuda_graphs=True)
    model = build_model(tiny_config("*-")).train()
    state = build_training_state([model], replace(config, optimizer=replace(config.optimizer, offload=True)))
    assert not state.capturable and not isinstance(state.optimizer.param_groups[0]["lr"], torch.Tensor)


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
