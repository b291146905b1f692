"""A layer's norm and its residual: the Triton kernels against the formula, on the CPU in Triton's interpreter."""

import importlib.util

import pytest
import torch

from megatron_hylo.kernels.norm import rms_norm
from megatron_hylo.kernels.residual_norm import rms_norm_and_residual
from tests.kernels.compare import interpreted
from tests.kernels.residual_norm_cases import SHAPES, USED, errors

LIMITS = {torch.float32: 2e-6, torch.bfloat16: 5e-3}  # bf16 is what results are written in


def test_on_a_cpu_it_is_the_norm_and_its_input():
    x, weight = torch.randn(3, 2, 8), torch.randn(8)
    out, residual = rms_norm_and_residual(x, weight, 1e-5)
    assert torch.equal(out, rms_norm(x, weight, 1e-5)) and residual is x
    with pytest.raises(ValueError, match=r"weight must be \[8\]"):
        rms_norm_and_residual(x, weight[:4], 1e-5)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_equal_the_formula_in_triton_s_interpreter():
    cases = [line.split("|") for line in interpreted("residual_norm_cases").splitlines() if line.startswith("CASE")]
    assert len(cases) == len(SHAPES) * 2 * len(USED)
    for name, error in cases:
        assert float(error) < LIMITS[torch.bfloat16 if "bfloat16" in name else torch.float32], (name, error)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_compile_for_hopper():
    """To machine code, which needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_hylo.kernels import triton_rms_norm as kernels

    given = dict(x="*bf16", weight="*bf16", scales="*fp32", rows="i32")
    more = dict(upstream="*bf16", residual="*bf16", gradient="*bf16", weight_gradient="*fp32")
    for width, columns, backward in ((576, 1024, (1, 1)), (2048, 2048, (2, 4))):  # rows, warps
        sizes = dict(WIDTH=width, COLUMNS=columns)
        for kernel, arguments, constants, (rows, warps) in (
            (kernels.normalise, given | dict(out="*bf16", eps="fp32"), sizes, (2, 4)),
            (kernels.differentiate, given | more, sizes | dict(SHARE=32, RESIDUAL=True), backward),
            (kernels.differentiate, given | more, sizes | dict(SHARE=32, RESIDUAL=False), backward),
        ):
            constants = constants | dict(ROWS=rows)
            source = ASTSource(kernel, arguments | dict.fromkeys(constants, "constexpr"), constants)
            target = GPUTarget("cuda", 90, 32)
            assert triton.compile(source, target=target, options=dict(num_warps=warps)).asm["cubin"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("shape", [*SHAPES, (4097, 576), (2, 3000, 2048), (1025, 4096), (100, 8192)])
def test_kernels_equal_the_formula_on_a_gpu(shape, used, dtype):
    assert max(errors(shape, dtype, used, "cuda")) < LIMITS[dtype]
