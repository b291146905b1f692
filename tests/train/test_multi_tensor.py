"""Norm, scaling, copies and AdamW of lists of tensors against Megatron-Core's and torch's own functions, one by one."""

import shutil

import pytest
import torch
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_hylo.config.train import OptimizerSettings
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.train import multi_tensor
from megatron_hylo.train.loop import train
from megatron_hylo.train.optimizer import build_training_state, counts_on_cpu, optimizer_parts
from tests.conftest import tiny_config
from tests.train.runs import metrics, weights

SHAPES = ((3, 5), (1,), (64, 17), (2, 3, 4))


def lists(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]


def check(device, own_norm):
    tensors = lists(device)
    norm, each = multi_tensor.l2_norm(65_536, None, [tensors], False)
    expected = torch.cat([x.double().flatten() for x in tensors]).norm()
    assert norm.shape == (1,) and norm.device == tensors[0].device and each is None
    assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    if own_norm:
        assert float(norm) == pytest.approx(float(local_multi_tensor_l2_norm(65_536, None, [tensors], False)[0]), rel=1e-6)

    reference = lists(device)
    local_multi_tensor_scale(65_536, None, [reference, reference], 0.37)
    for factor in (0.37, torch.tensor([0.37], device=device)):
        clipped = lists(device)
        multi_tensor.scale(65_536, None, [clipped, clipped], factor)
        assert all(map(torch.equal, clipped, reference))

    copies = [torch.full_like(x, 9.0, dtype=torch.bfloat16) for x in tensors]
    multi_tensor.scale(65_536, None, [tensors, copies], 1.0)
    assert all(torch.equal(copy, x.bfloat16()) for copy, x in zip(copies, tensors, strict=True))
    assert all(map(torch.equal, tensors, lists(device)))  # sources stay
    multi_tensor.scale(65_536, None, [[], []], 1.0)


def test_it_equals_megatron_cores_own_functions(one_rank):
    check("cpu", own_norm=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_it_equals_megatron_cores_own_functions_on_a_gpu():
    check("cuda", own_norm=False)  # its norm needs a process group's device


def test_a_run_uses_it_unless_a_library_is_there(settings, one_rank, monkeypatch):
    library = object()
    scaling, by_tensor = "multi_tensor_scale_impl", "multi_tensor_scale_tensor_impl"
    scales = (clip_grads, scaling), (clip_grads, by_tensor), (megatron_optimizer, scaling)
    for module, name in (*scales, (clip_grads, "l2_norm_impl")):
        monkeypatch.setattr(module, name, library)
    model = build_model(tiny_config("*-"), params_dtype=torch.float32)
    build_training_state([model], settings("pretrain"))
    assert {clip_grads.l2_norm_impl, *(getattr(*where) for where in scales)} == {library}
    monkeypatch.setattr(clip_grads, "l2_norm_impl", local_multi_tensor_l2_norm)
    build_training_state([model], settings("pretrain"))
    assert clip_grads.l2_norm_impl is multi_tensor.l2_norm
    assert {getattr(*where) for where in scales} == {multi_tensor.scale}


@pytest.mark.parametrize("clip_grad", [0.5, 1e6])
def test_gradients_are_clipped_without_asking_for_their_norm(settings, one_rank, clip_grad):
    """By Megatron-Core's functions with ours; the formula is the oracle. A norm below the limit changes no gradient."""
    model = build_model(tiny_config("*-"), params_dtype=torch.float32)
    state = build_training_state([model], settings("pretrain", optimizer=OptimizerSettings(clip_grad=clip_grad)))
    for p in model.parameters():
        p.main_grad.normal_()
    gradients = [p.main_grad.clone() for p in model.parameters()]
    expected = torch.cat([x.double().flatten() for x in gradients]).norm()
    norm = state.update()
    assert isinstance(norm, torch.Tensor) and float(norm) == pytest.approx(float(expected), rel=1e-6)
    factor = min(1.0, clip_grad / (float(expected) + 1e-6))
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.main_grad, gradient * factor, rtol=1e-6 if factor < 1 else 0.0, atol=0.0)


def adamw_updates(device, fused):
    """Parameters after three updates of torch's AdamW with weight decay, and the optimizer."""
    parameters = [torch.nn.Parameter(x) for x in lists(device)]
    optimizer = torch.optim.AdamW(
        [dict(params=parameters[:2], weight_decay=0.1), dict(params=parameters[2:], lr=3e-3)], lr=1e-2, weight_decay=0.0
    )
    if fused:
        multi_tensor.fuse_adamw([optimizer])
    for number in range(3):
        for p in parameters:
            p.grad = (1 + number) * p.detach().cos()
        optimizer.step()
    return parameters, optimizer


def check_adamw(device):
    (mine, optimizer), (theirs, other) = (adamw_updates(device, fused) for fused in (True, False))
    assert all(group["fused"] for group in optimizer.param_groups)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)
        state, expected = optimizer.state[a], other.state[b]
        assert float(state["step"]) == float(expected["step"]) == 3 and state["step"].device.type == device
        assert all(torch.allclose(state[name], expected[name], rtol=1e-5, atol=1e-7) for name in ("exp_avg", "exp_avg_sq"))


def test_fused_adamw_equals_torchs_own(monkeypatch):
    monkeypatch.setattr(multi_tensor, "FUSED_ON", ("cpu",))
    check_adamw("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_fused_adamw_equals_torchs_own_on_a_gpu():
    check_adamw("cuda")


def test_adamw_is_fused_on_a_gpu_alone_and_other_optimizers_stay():
    optimizer = adamw_updates("cpu", fused=True)[1]
    assert not any(group["fused"] for group in optimizer.param_groups)
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    groups = [dict(group) for group in other.param_groups]
    multi_tensor.fuse_adamw([other, None])
    assert other.param_groups == groups


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weights_are_copied_together_as_megatron_core_does(settings, one_rank, name):
    """Its own method, which each optimizer's class still has, is the oracle."""
    model = build_model(tiny_config("G-+-M-*-"), params_dtype=torch.bfloat16).train()
    optimizer = OptimizerSettings(name=name, use_distributed_optimizer=name == "adamw")
    state = build_training_state([model], settings("pretrain", precision="bf16", optimizer=optimizer))
    weights = {key: p.detach().clone() for key, p in model.named_parameters()}
    for part in optimizer_parts(state.optimizer):
        for p in part.get_parameters():
            p.data += torch.randn_like(p)
    found = []
    for own in (True, False):
        for key, p in model.named_parameters():
            if p.dtype == torch.bfloat16:
                p.data.copy_(weights[key])
        for part in optimizer_parts(state.optimizer):
            if hasattr(part, "_copy_main_params_to_model_params"):  # that of fp32 weights has none
                part._copy_main_params_to_model_params() if own else type(part)._copy_main_params_to_model_params(part)
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *found)) and not any(map(torch.equal, found[0], weights.values()))


def test_counts_of_steps_leave_the_gpu_before_they_are_saved():
    with FakeTensorMode():
        count, moment = torch.ones((), device="cuda"), torch.ones(3, device="cuda")
        state = {0: {"optimizer": {"state": {"common_step": count, 7: {"exp_avg": moment}}}}, 1: {"state": {}}}
        counts_on_cpu(state)
    assert state[0]["optimizer"]["state"]["common_step"].device.type == "cpu"
    assert state[0]["optimizer"]["state"][7]["exp_avg"] is moment


@pytest.mark.parametrize(
    ("name", "precision", "distributed"),
    [("adamw", "fp32", True), ("adamw", "bf16", True), ("adamw", "fp32", False), ("muon", "bf16", False)],
)
def test_a_run_with_fused_adamw_resumes_to_the_last_bit_and_takes_older_checkpoints(
    settings, tmp_path, monkeypatch, name, precision, distributed
):
    """An older checkpoint is one of torch's own AdamW; fused updates differ from that by rounding."""

    optimizer = OptimizerSettings(name=name, lr=2e-3, warmup_ratio=0.0, adam_eps=1e-3, use_distributed_optimizer=distributed)

    def config(run: str):
        return settings("pretrain", steps=4, output=tmp_path / run, precision=precision, checkpoint=dict(save_interval=2),
                        optimizer=optimizer)  # fmt: skip

    def resumed(run: str, start: str) -> dict:
        checkpoint = tmp_path / start / "checkpoints" / "step_00000002"
        shutil.copytree(checkpoint, tmp_path / run / "checkpoints" / checkpoint.name)
        train(config(run))
        return weights(tmp_path / run / "checkpoints" / "step_00000004")

    train(config("own"))
    monkeypatch.setattr(multi_tensor, "FUSED_ON", ("cpu",))
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    state = build_training_state([build_model(tiny_config("*-"), params_dtype=dtype)], config("unused"))
    adamw = [p.optimizer for p in optimizer_parts(state.optimizer) if isinstance(p.optimizer, torch.optim.AdamW)]
    assert adamw and all(group["fused"] for one in adamw for group in one.param_groups)
    train(config("whole"))
    whole, mine = weights(tmp_path / "whole" / "checkpoints" / "step_00000004"), resumed("resumed", "whole")
    assert all(torch.equal(mine[key], x) for key, x in whole.items() if isinstance(x, torch.Tensor))
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    resumed("from_own", "own")
    for run, steps in (("whole", [1, 2, 3, 4]), ("from_own", [3, 4])):
        losses, expected = metrics(tmp_path / run), metrics(tmp_path / "own")
        assert list(losses) == steps
        assert losses == pytest.approx({step: expected[step] for step in steps}, rel=tolerance)
