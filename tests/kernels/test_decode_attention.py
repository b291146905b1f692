"""Kernels of the decode step: attention's plain form against torch's, the Triton kernels against the plain forms."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_hylo.kernels import decode_attention as module
from megatron_hylo.kernels.attention import attention
from megatron_hylo.kernels.decode_attention import decode_attention, number_of_splits
from megatron_hylo.kernels.quantised_latents import FORMATS, dequantise_latents, quantise_latents
from tests.kernels.decode_attention_cases import (
    convolution_errors,
    errors,
    matvec_errors,
    packed_errors,
    recurrence_errors,
    scaled_matvec_errors,
)

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.mark.parametrize("groups", [1, 2])
def test_plain_form_equals_sdpa_over_the_rows_in_use(groups):
    q, k, v = torch.randn(2, 6, 20).double(), torch.randn(2, 50, groups, 20).double(), torch.randn(2, 50, groups, 12).double()
    expected = attention(q[:, None], k[:, :33], v[:, :33], 0.3, causal=False)[:, 0]
    k[:, 33:] = v[:, 33:] = torch.nan
    length = torch.tensor([33], dtype=torch.int32)
    torch.testing.assert_close(decode_attention(q, k, v, 0.3, length), expected)
    real = torch.arange(50)[None] >= torch.tensor([[4], [0]])
    alone = attention(q[:1, None], k[:1, 4:33], v[:1, 4:33], 0.3, causal=False)[:, 0]
    padded = decode_attention(q, k, v, 0.3, length, real)
    torch.testing.assert_close(padded, torch.cat([alone, expected[1:]]))


@needs_triton
def test_kernels_equal_the_plain_form_in_triton_s_interpreter() -> None:
    """On the CPU: widths that are no powers of two, unwritten rows, padding, 8-bit latents."""
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("decode_attention_cases.py"))],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    cases = [line.split("CASE ")[1].split("|") for line in result.stdout.splitlines() if "CASE " in line]
    assert len(cases) == 2 * (5 + 3 + 4) + 16 + 4 + 8, result.stdout
    for name, error in cases:
        bound = 1e-6 if "float32" in name else 8e-3 if "bfloat16" in name else 1e-3  # the interpreter does not round to bf16
        assert float(error) < bound, (name, error)


@needs_triton
@pytest.mark.parametrize(
    "latents, shared, packed",
    [(None, True, False), ("int8", True, False), ("fp8", True, True), (None, False, False), (None, True, True)],
    ids=["bf16", "int8", "fp8 packed", "grouped", "packed"],
)
def test_kernels_compile_for_hopper(latents, shared, packed) -> None:
    """To machine code, which needs no GPU; sizes of the 3B models."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_hylo.kernels import triton_decode_attention as kernels
    from megatron_hylo.kernels.triton_causal_conv1d_step import step
    from megatron_hylo.kernels.triton_matvec import multiply

    key = {None: "*bf16", "int8": "*i8", "fp8": "*fp8e4nv"}[latents]
    sizes = (
        dict(HEADS=24, HEAD_ROWS=32, REST=64, REST_COLUMNS=64)
        if shared
        else dict(HEADS=3, HEAD_ROWS=16, REST=0, REST_COLUMNS=16)
    )
    constants = sizes | dict(FIRST=128, FIRST_COLUMNS=128, WIDTH=128, WIDTH_COLUMNS=128, SHARED=shared, LENGTH=True,
                             MASKED=not packed, QUANTISED=latents is not None, SPLITS=512, BLOCK=module.BLOCK,
                             PACKED=packed, COLUMNS=256)  # fmt: skip
    strides = "k_batch k_row k_group v_batch v_row v_group real_batch scales_batch scales_row".split()
    arguments = dict(q="*bf16", k=key, v=key, length="*i32", starts="*i32", real="*i1", scales="*bf16",
                     partial="*fp32", sums="*fp32", scale="fp32", rows="i32", groups="i32",
                     sequences="i32") | dict.fromkeys(strides, "i64")  # fmt: skip
    for kernel, given, constant in (
        (kernels.attend_part, arguments, constants),
        (
            kernels.combine_parts,
            dict(partial="*fp32", sums="*fp32", out="*bf16"),
            dict(SPLITS=512, WIDTH=128, COLUMNS=128, TILE=32),
        ),
        (
            kernels.combine_packed_parts,
            dict(partial="*fp32", sums="*fp32", lengths="*i32", out="*bf16", sequences="i32"),
            dict(HEADS=24, PARTS=512, BLOCK=module.BLOCK, WIDTH=128, WIDTH_COLUMNS=128, TILE=16, COLUMNS=256),
        ),
        (
            step,
            dict(x="*bf16", state="*bf16", weight="*bf16", bias="*bf16", out="*bf16", channels="i32", x_batch="i32"),
            dict(TAPS=4, BIAS=shared, SILU=True, BLOCK=128),
        ),
        (
            multiply,
            dict(
                x="*bf16",
                weight=key if latents != "int8" else "*bf16",
                residual="*bf16",
                scale="*fp32",
                out="*bf16",
                rows="i32",
                stride="i32",
            ),
            dict(WIDTH=3072, ROWS=4, COLUMNS=512, EVEN=shared, SWIGLU=True, RESIDUAL=True, SCALED=latents == "fp8"),
        ),
    ):
        source = ASTSource(kernel, given | dict.fromkeys(constant, "constexpr"), constant)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, num_stages=3))
        assert compiled.asm["cubin"] and compiled.metadata.shared < 200_000


def test_splits_fill_a_gpu_where_there_are_keys() -> None:
    assert [number_of_splits(1, rows) for rows in (64, 8192, 2**21)] == [1, 32, 512]
    assert [number_of_splits(programs, 2**21) for programs in (8, 100, 2000)] == [64, 8, 1]


@pytest.mark.parametrize("name", FORMATS)
def test_quantised_latents_are_half_a_step_wrong_at_most(name):
    rows = torch.randn(50, 24) * torch.logspace(-6, 4, 50)[:, None]
    rows[:, 16:] *= 30
    rows[3] = 0
    values, scales = quantise_latents(rows, 16, name)
    assert values.element_size() == 1 and scales.shape == (50, 2) and torch.isfinite(values.float()).all()
    back = dequantise_latents(values, scales, 16, torch.float64)
    for part in (slice(0, 16), slice(16, 24)):
        largest = rows[:, part].abs().amax(1, keepdim=True)
        step = largest / 127 if name == "int8" else torch.maximum(rows[:, part].abs() / 8, largest / 448 / 64)
        assert ((back - rows)[:, part].abs() <= 0.51 * step).all()
    assert torch.equal(back[3], torch.zeros(24, dtype=torch.float64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_kernels_equal_the_plain_form_on_the_gpu() -> None:
    cases = [f("cuda", 70_000, (torch.float32, torch.bfloat16)) for f in (errors, packed_errors)]
    for name, (error, dtype) in (cases[0] | cases[1]).items():
        assert error < (1e-5 if dtype == torch.float32 else 6e-3), (name, error)
    for name, error in matvec_errors("cuda", ((13842, 3072), (8192, 4608), (30, 700)), (torch.float32, torch.bfloat16)).items():
        assert error < (1e-5 if "float32" in name else 6e-3), (name, error)
    others = scaled_matvec_errors("cuda", ((13842, 3072), (8192, 4608), (30, 700)))
    others |= convolution_errors("cuda", (torch.float32, torch.bfloat16))
    for dtype in (torch.float32, torch.bfloat16):
        others |= recurrence_errors("cuda", dtype)
    for name, error in others.items():
        assert error < (1e-5 if "float32" in name else 6e-3), (name, error)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("b, rows", [(7, 2**21), (1, 12 * 2**20)])  # the last batch, or the last row, begins past 2^31
def test_rows_past_two_to_the_31st_element_are_read(b: int, rows: int) -> None:
    width = 192
    k = torch.zeros(b, rows, 1, width, dtype=torch.bfloat16, device="cuda")
    k[-1, -1] = k[-1, 1_900_000] = 1.0
    q = torch.full((b, 24, width), 0.5, dtype=torch.bfloat16, device="cuda")
    out = decode_attention(q, k, 128, 1.0)
    torch.testing.assert_close(out[-1].float(), torch.ones_like(out[-1]).float())
    assert not out[:-1].any()
