"""Compiled element-by-element functions equal themselves as they are, outputs and gradients, on a GPU."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from megatron_hylo.kernels import elementwise
from megatron_hylo.kernels.registry import in_use, override
from megatron_hylo.models.attention import fused_rope
from megatron_hylo.models.gdn import gates_of
from megatron_hylo.models.layers import fused_gated_rms_norm
from megatron_hylo.models.mla import rotate, shared_key
from tests.kernels.compare import relative_error


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda" if torch.cuda.is_available() else "cpu", dtype=dtype, requires_grad=True)


def cases(b: int, t: int, h: int, d: int) -> dict:
    table = [torch.randn(t, d // 2, device="cuda" if torch.cuda.is_available() else "cpu") for _ in range(2)]
    few = [x[:, : d // 4].contiguous() for x in table]
    fp32 = torch.float32
    strided = normal(t, b, h, 2 * d).transpose(0, 1)
    return {
        "rope": (fused_rope, [strided[..., :d], *table], dict(interleaved=False)),
        "rope, pairs": (fused_rope, [strided[..., d:], *table], dict(interleaved=True)),
        "rotate": (rotate, [normal(b, t, h, d), *few], {}),
        "shared key": (shared_key, [strided[..., :d], normal(b, t, d // 2), *few], {}),
        "gated norm": (
            fused_gated_rms_norm, [normal(b, t, h, d), strided[..., d:], normal(d), 1e-5], dict(norm_before_gate=True)
        ),
        "grouped norm": (
            fused_gated_rms_norm, [normal(b, t, h * d), normal(b, t, h * d), normal(h * d), 1e-5],
            dict(norm_before_gate=False, group_size=d),
        ),
        "gates": (gates_of, [normal(b, t, h), normal(b, t, h), normal(h, dtype=fp32), normal(h, dtype=fp32)], {}),
    }  # fmt: skip


def test_many_shapes_share_a_kernel(monkeypatch) -> None:
    """Else each would be compiled, and after `RECOMPILATIONS` none."""
    counter = CompileCounter()
    monkeypatch.setattr(elementwise, "library_unsupported", lambda *_: None)  # the counter runs anywhere
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    double = elementwise.elementwise(lambda x, factor: factor * x)
    for _ in range(2):
        for length in range(2, 102):
            x = torch.full((length, 3), 2.0)
            assert torch.equal(double(x, torch.tensor(3.0)), 3 * x)
        assert counter.frame_count == elementwise.OWN_SHAPES + 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("shape", [(1, 300, 3, 32), (2, 128, 9, 64)])
@pytest.mark.parametrize("name", list(cases(1, 2, 1, 8)))
def test_compiled_equals_eager(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    function, inputs, settings = cases(*shape)[name]
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    results = []
    for implementation in ("torch", "inductor"):
        with override("elementwise", implementation):
            out = function(*inputs, **settings)
        assert in_use()["elementwise"] == implementation
        out = out if isinstance(out, tuple) else (out,)
        upstream = [torch.ones_like(x) * torch.linspace(-1, 1, x.shape[-1], device=x.device, dtype=x.dtype) for x in out]
        results.append([*out, *torch.autograd.grad(out, wanted, upstream)])
    for eager, compiled in zip(*results, strict=True):
        assert compiled.dtype == eager.dtype and relative_error(compiled, eager) < 5e-3
