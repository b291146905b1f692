"""Norm, scaling and copies of lists of tensors against Megatron-Core's own functions, which take them one by one."""

import pytest
import torch
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale

from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.train import multi_tensor
from megatron_hylo.train.optimizer import build_training_state
from tests.conftest import tiny_config

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

    clipped, reference = lists(device), lists(device)
    multi_tensor.scale(65_536, None, [clipped, clipped], 0.37)
    local_multi_tensor_scale(65_536, None, [reference, reference], 0.37)
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
    for module in (clip_grads, megatron_optimizer):
        monkeypatch.setattr(module, "multi_tensor_scale_impl", library)
    monkeypatch.setattr(clip_grads, "l2_norm_impl", library)
    model = build_model(tiny_config("*-"), params_dtype=torch.float32)
    build_training_state([model], settings("pretrain"))
    assert (
        clip_grads.l2_norm_impl is clip_grads.multi_tensor_scale_impl is megatron_optimizer.multi_tensor_scale_impl is library
    )
    monkeypatch.setattr(clip_grads, "l2_norm_impl", local_multi_tensor_l2_norm)
    build_training_state([model], settings("pretrain"))
    assert clip_grads.l2_norm_impl is multi_tensor.l2_norm
    assert clip_grads.multi_tensor_scale_impl is megatron_optimizer.multi_tensor_scale_impl is multi_tensor.scale
