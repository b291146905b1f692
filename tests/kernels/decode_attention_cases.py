"""The Triton kernels of the decode step against their plain forms in float64; prints a line a case: name|relative error.

Started by test_decode_attention.py in Triton's interpreter on the CPU, imported by its GPU test.
"""

import itertools

import torch

from megatron_hylo.kernels import causal_conv1d, decode_attention, matvec, recurrence_step
from megatron_hylo.kernels.quantised_latents import quantise_latents
from megatron_hylo.kernels.recurrence_step import delta_rule_step
from megatron_hylo.kernels.registry import override

LATENT = dict(groups=1, heads=6, d=40 + 12, v=40)  # widths that are no powers of two
GROUPED = dict(groups=2, heads=6, d=20, v=24)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def make_case(
    groups: int, heads: int, d: int, v: int, dtype: torch.dtype, rows: int, used: int | None, padded: bool, latents: str | None,
    device: str,
) -> tuple[dict, torch.Tensor]:  # fmt: skip
    """Arguments of `split_attention` and what the plain form makes of them; rows after the used ones hold NaN."""
    generator = torch.Generator().manual_seed(0)
    b, shared = 3, groups == 1
    q = torch.randn(b, heads, d, generator=generator).to(device, dtype)
    k = 2 * torch.randn(b, rows, groups, d, generator=generator).to(device, dtype)
    value = v if shared else torch.randn(b, rows, groups, v, generator=generator).to(device, dtype)
    real, scales = None, None
    if padded:
        real = torch.arange(rows, device=device)[None] >= torch.tensor([0, 100, 3], device=device)[:, None]
    if latents:
        values, scales = quantise_latents(k[:, :, 0], v, latents)
        k = values[:, :, None]
    if used is not None:
        for unused in (scales,) if latents else (k, value):
            if isinstance(unused, torch.Tensor):
                unused[:, used:] = torch.nan
    length = None if used is None else torch.tensor([used], dtype=torch.int32, device=device)
    arguments = dict(q=q, k=k, v=value, scale=d**-0.5, length=length, real=real, scales=scales)
    wide = {name: x.double() if isinstance(x, torch.Tensor) and x.dtype == dtype else x for name, x in arguments.items()}
    return arguments, decode_attention._torch(**wide)


def errors(device: str, rows: int, dtypes: tuple[torch.dtype, ...]) -> dict[str, tuple[float, torch.dtype]]:
    """Relative error of each case."""
    found = {}
    for dtype, shape in itertools.product(dtypes, ({"latent": LATENT}, {"grouped": GROUPED})):
        ((name, sizes),) = shape.items()
        for used, padded, latents in ((None, False, None), (rows - 75, True, None), (rows // 2, False, "fp8"), (1, False, None),
                                      (rows - 1, True, "int8")):  # fmt: skip
            if latents and name == "grouped":
                continue
            arguments, expected = make_case(
                **sizes, dtype=dtype, rows=rows, used=used, padded=padded, latents=latents, device=device
            )
            out = decode_attention.split_attention(**arguments)
            found[f"{name} {dtype} {used} {padded} {latents}"] = relative_error(out, expected), dtype
    return found


def packed_errors(device: str, rows: int, dtypes: tuple[torch.dtype, ...]) -> dict[str, tuple[float, torch.dtype]]:
    """Relative error of packed batches: lengths from 1 to `rows`, in another order in memory, between rows of NaN."""
    generator, found = torch.Generator().manual_seed(0), {}
    lengths, order = [1, rows, 256, 257, rows // 3], [3, 1, 4, 0, 2]
    starts, end = [0] * 5, 5
    for number in order:
        starts[number], end = end, end + lengths[number] + 7
    for dtype, (name, sizes), latents in itertools.product(
        dtypes, (("latent", LATENT), ("grouped", GROUPED)), (None, "int8", "fp8")
    ):
        if latents and name == "grouped":
            continue
        heads, groups, d, v = (sizes[key] for key in ("heads", "groups", "d", "v"))
        q = torch.randn(5, heads, d, generator=generator).to(device, dtype)
        k = torch.full((1, end, groups, d), torch.nan, dtype=dtype, device=device)
        value = v if groups == 1 else torch.full((1, end, groups, v), torch.nan, dtype=dtype, device=device)
        for start, count in zip(starts, lengths):
            for held in (k, value):
                if isinstance(held, torch.Tensor):
                    held[:, start : start + count] = 2 * torch.randn(held[:, :count].shape, generator=generator).to(device)
        scales = None
        if latents:
            values, scales = quantise_latents(k[:, :, 0].nan_to_num(1e4), v, latents)  # rows of no sequence: scales of 100
            k = values[:, :, None]
        length, first = (torch.tensor(x, dtype=torch.int32, device=device) for x in (lengths, starts))
        out = decode_attention.split_attention(q, k, value, d**-0.5, length, None, scales, first)
        wide = [x.double() if isinstance(x, torch.Tensor) and x.dtype == dtype else x for x in (q, k, value)]
        expected = decode_attention._packed_torch(*wide, d**-0.5, length, scales, first)
        found[f"packed {name} {dtype} {latents}"] = relative_error(out, expected), dtype
    return found


def matvec_errors(device: str, sizes: tuple[tuple[int, int], ...], dtypes: tuple[torch.dtype, ...]) -> dict[str, float]:
    """Relative error of the product with each matrix, [rows, columns], with and without SwiGLU and residual."""
    generator, found = torch.Generator().manual_seed(0), {}
    for dtype, (rows, columns), swiglu, added in itertools.product(dtypes, sizes, (False, True), (False, True)):
        matrix, x = (torch.randn(size, generator=generator).to(device, dtype) for size in ((rows, columns), (1, 1, columns)))
        weight = torch.full((rows + 2, columns + 8), torch.nan, dtype=dtype, device=device)[:rows, :columns]
        weight.copy_(matrix)  # a part of a larger matrix
        residual = torch.randn(1, 1, rows // 2 if swiglu else rows, generator=generator).to(device, dtype) if added else None
        out = matvec.one_vector(x, weight, residual, swiglu)
        wide = None if residual is None else residual.double()
        with override("matvec", "torch"):
            expected = matvec.matvec(x.double(), weight.double(), wide, swiglu)
        assert out.shape == expected.shape
        found[f"matvec {dtype} {rows} x {columns} {swiglu} {added}"] = relative_error(out, expected)
    return found


def scaled_matvec_errors(device: str, sizes: tuple[tuple[int, int], ...]) -> dict[str, float]:
    """Relative error of bf16 products with FP8 matrices and scales of their rows, which vary by a factor of a thousand."""
    generator, found = torch.Generator().manual_seed(0), {}
    for (rows, columns), swiglu in itertools.product(sizes, (False, True)):
        weight = torch.randn(rows, columns, generator=generator).to(device).to(torch.float8_e4m3fn)
        scale = torch.logspace(-3, 0, rows)[torch.randperm(rows, generator=generator)].to(device)
        x = torch.randn(1, 1, columns, generator=generator).to(device, torch.bfloat16)
        with override("matvec", "torch"):
            expected = matvec.matvec(x.double(), weight.double() * scale.double()[:, None], None, swiglu)
        out = matvec.one_vector(x, weight, None, swiglu, scale)
        found[f"matvec bfloat16 FP8 {rows} x {columns} {swiglu}"] = relative_error(out, expected)
    return found


def convolution_errors(device: str, dtypes: tuple[torch.dtype, ...]) -> dict[str, float]:
    """Relative error of the outputs and of the state after a step, with and without bias and SiLU."""
    generator, found = torch.Generator().manual_seed(0), {}
    for dtype, taps, biased in itertools.product(dtypes, (2, 4), (False, True)):
        sizes = (2, 1, 300), (2, 300, taps - 1), (300, taps), (300,)
        x, state, weight, bias = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
        x = torch.cat([x, x], -1)[..., 300:]  # a section of a larger tensor
        given = (weight, bias if biased else None, "silu" if biased else None)
        expected, after = causal_conv1d._one_token(
            x.double(), state.double(), *(g.double() if torch.is_tensor(g) else g for g in given)
        )
        out = causal_conv1d.convolve_one_token(x, state, *given)
        found[f"convolution {dtype} {taps} {biased}"] = max(relative_error(out, expected), relative_error(state, after))
    return found


def recurrence_errors(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Relative error of the outputs and of the state after a step of fla's kernel: plain, with gates, a decay a channel."""
    generator, found = torch.Generator().manual_seed(0), {}
    (b, h, keys, values) = sizes = (2, 3, 16, 24)
    for name in ("plain", "gates", "channels"):
        q, k, v = (torch.randn(b, 1, h, n, generator=generator).to(device, dtype) for n in (keys, keys, values))
        state = torch.randn(sizes, generator=generator).to(device)
        decay = -torch.rand(b, 1, h, *([keys] if name == "channels" else []), generator=generator).to(device)
        beta, rate, bias = (torch.rand(size, generator=generator).to(device) for size in ((b, 1, h), (h,), (h,)))
        gates, wide = (rate, bias) if name == "gates" else None, state.double()
        with override("kda" if name == "channels" else "gated_delta_rule", "torch"):
            expected = delta_rule_step(q.double(), k.double(), v.double(), decay, beta, wide, gates)
        out = recurrence_step._fla(q, k, v, decay, beta, state, gates)
        found[f"step {dtype} {name}"] = max(relative_error(out, expected), relative_error(state, wide))
    return found


if __name__ == "__main__":
    from tests.kernels.interpreter import mend_interpreter

    mend_interpreter("megatron_hylo.kernels.triton_decode_attention", "megatron_hylo.kernels.triton_matvec")
    torch.set_num_threads(1)
    for name, (error, _) in errors("cpu", 700, (torch.float32, torch.float16)).items():  # its products know no bf16
        print(f"CASE {name}|{error}")
    for name, (error, _) in packed_errors("cpu", 700, (torch.float32, torch.float16)).items():
        print(f"CASE {name}|{error}")
    for name, error in matvec_errors("cpu", ((602, 1024), (22, 2500)), (torch.float32, torch.bfloat16)).items():
        print(f"CASE {name}|{error}")
    for name, error in scaled_matvec_errors("cpu", ((602, 1024), (22, 2500))).items():
        print(f"CASE {name}|{error}")
    for name, error in convolution_errors("cpu", (torch.float32, torch.bfloat16)).items():
        print(f"CASE {name}|{error}")
