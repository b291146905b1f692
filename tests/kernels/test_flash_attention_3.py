"""Attention without a gradient by FlashAttention-3: its kernels on a GPU; on a CPU what surrounds them, with a softmax in plain
torch that takes the kernels' arguments in their place."""

import sys
import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_hylo.kernels import flash_attention_3 as fa3
from megatron_hylo.kernels.attention import attention
from megatron_hylo.kernels.blockwise_attention import blockwise_attention
from megatron_hylo.kernels.registry import Unsupported, import_error, in_use, override
from megatron_hylo.models.kernel_check import Check, check_kernels
from megatron_hylo.models.recompute import MixerLayer
from tests.conftest import tiny_config
from tests.kernels.compare import relative_error
from tests.kernels.test_attention import explicit

DOCUMENTS = [(slice(0, 5), slice(3, 12)), (slice(5, 6), slice(12, 13)), (slice(6, 40), slice(13, 47))]
# [t, s, query heads, KV heads, width of keys, of values]
SHAPES = [(40, 40, 6, 2, 64, 64), (33, 70, 4, 4, 128, 128), (40, 47, 8, 1, 96, 64), (40, 40, 4, 2, 192, 128)]
PADDED = [(40, 47, 8, 2, 98, 64), (33, 40, 4, 2, 70, 64), (40, 40, 4, 2, 186, 124)]  # to multiples of 8, for FP8 of 16


def inputs(t: int, s: int, heads: int, groups: int, d: int, dv: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(t + d)
    shapes = ((1, t, heads, d), (1, s, groups, d), (1, s, groups, dv))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.to(device, dtype) for x in (2 * q, k + 2 * torch.randn(groups, d, generator=generator), v)]


def by_document(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.cat([explicit(q[:, own], k[:, seen], v[:, seen], scale) for own, seen in DOCUMENTS], 1)


class PlainKernels(types.ModuleType):
    """The functions of fa3_fwd_interface in plain torch, and its restrictions on widths and dtypes."""

    @staticmethod
    def flash_attn_func(
        q, k, v, softmax_scale, causal, return_attn_probs, q_descale=None, k_descale=None, v_descale=None
    ) -> tuple[Tensor, Tensor]:
        (b, t, heads, d), (s, groups), dv = q.shape, k.shape[1:3], v.shape[-1]
        multiple = 16 if q.dtype == torch.float8_e4m3fn else 8
        assert d % multiple == dv % multiple == 0
        assert d == dv or (128 < d <= 192 and 96 < dv <= 128)
        assert return_attn_probs and all(x.stride(-1) == 1 for x in (q, k, v))
        if q.dtype == torch.float8_e4m3fn:
            scales = (q_descale, k_descale, v_descale)
            assert all(scale.shape == (b, groups) and scale.dtype == torch.float32 for scale in scales)
            q, k, v = (
                x.float() * scale.repeat_interleave(x.shape[2] // groups, 1)[:, None, :, None]
                for x, scale in zip((q, k, v), scales)
            )
        k, v = (x.repeat_interleave(heads // groups, 2) for x in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) * softmax_scale
        if causal:
            scores = scores.masked_fill(torch.ones(t, s, dtype=torch.bool).triu(1 + s - t), -torch.inf)
        return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v), scores.logsumexp(-1)

    @classmethod
    def flash_attn_varlen_func(
        cls, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **settings
    ) -> tuple[Tensor, Tensor]:
        ends = [x.tolist() for x in (cu_seqlens_q, cu_seqlens_k)]
        assert all(x.dtype == torch.int32 for x in (cu_seqlens_q, cu_seqlens_k)) and ends[1][-1] == len(k)
        lengths = [[stop - start for start, stop in zip(x, x[1:])] for x in ends]
        assert [max(x) for x in lengths] == [max_seqlen_q, max_seqlen_k]
        scales = {name: settings.pop(name) for name in list(settings) if name.endswith("descale")}
        outs = []
        for number, parts in enumerate(
            zip(*(x.split(sizes) for x, sizes in ((q, lengths[0]), (k, lengths[1]), (v, lengths[1]))))
        ):
            own = {name: scale[number : number + 1] for name, scale in scales.items()}
            outs.append(cls.flash_attn_func(*(x[None] for x in parts), **settings, **own))
        return torch.cat([out[0] for out, _ in outs]), torch.cat([log_sum[0] for _, log_sum in outs], 1)


@pytest.fixture
def plain_kernels(monkeypatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, fa3.MODULE, PlainKernels(fa3.MODULE))
    monkeypatch.setattr(fa3, "unsupported", lambda *_: None)
    with override(fa3.OPERATION, "fa3"):
        yield


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES + PADDED)
def test_plain_kernels_match_explicit_softmax(shape, causal, plain_kernels) -> None:
    q, k, v = inputs(*shape, torch.float64)
    assert relative_error(attention(q, k, v, 0.1, causal), explicit(q, k, v, 0.1, causal)) < 1e-10
    assert in_use()[fa3.OPERATION] == "fa3"


@pytest.mark.parametrize("kernel", ["fa3", "fa3_fp8"])
def test_packed_documents_are_one_call_and_match_explicit_softmax(kernel, plain_kernels) -> None:
    q, k, v = inputs(40, 50, 6, 2, 64, 48, torch.float32)
    with override(fa3.OPERATION, kernel):
        error = relative_error(attention(q, k, v, 0.125, documents=DOCUMENTS), by_document(q, k, v, 0.125))
    assert error < 1e-5 if kernel == "fa3" else 1e-3 < error < 0.1
    with override(fa3.OPERATION, "torch"):
        assert relative_error(attention(q, k, v, 0.125, documents=DOCUMENTS), by_document(q, k, v, 0.125)) < 1e-5


def test_fp8_is_off_by_rounding_and_less_with_centred_keys(plain_kernels, monkeypatch) -> None:
    q, k, v = inputs(64, 64, 6, 2, 64, 64, torch.bfloat16)
    truth, errors, right = explicit(q.float(), k.float(), v.float(), 0.125), [], fa3.quantise
    for centred in (True, False):
        if not centred:
            monkeypatch.setattr(fa3, "quantise", lambda x, centred=False: right(x))
        with override(fa3.OPERATION, "fa3_fp8"):
            errors.append(relative_error(attention(q, k, v, 0.125), truth))
    assert 1e-3 < errors[0] < 0.07 and errors[0] < 0.8 * errors[1]


def test_fp8_heads_of_any_width_are_off_by_rounding(plain_kernels) -> None:
    q, k, v = inputs(40, 47, 8, 2, 98, 72, torch.bfloat16)
    with override(fa3.OPERATION, "fa3_fp8"):
        error = relative_error(attention(q, k, v, 0.1), explicit(q.float(), k.float(), v.float(), 0.1))
    assert 1e-3 < error < 0.1


def test_quantisation_uses_all_of_the_range() -> None:
    x = torch.randn(2, 50, 3, 16).bfloat16() * torch.tensor([1e-6, 1.0, 3e4])[:, None].bfloat16()
    found, factor = fa3.quantise(x)
    restored = found.float() * factor[:, None, :, None]
    assert factor.shape == (2, 3) and torch.equal(factor.log2(), factor.log2().round())
    assert ((restored - x.float()).norm(dim=(1, 3)) / x.float().norm(dim=(1, 3))).max() < 0.03
    assert found.float().abs().amax((1, 3)).min() > 223 and torch.isfinite(found.float()).all()


def test_a_prefix_in_blocks_matches_the_whole(plain_kernels) -> None:
    q, k, v = inputs(20, 50, 6, 2, 64, 48, torch.float64)
    blocks = ((k[:, part], v[:, part]) for part in (slice(0, 7), slice(7, 30)))
    found = blockwise_attention(q, blocks, (k[:, 30:], v[:, 30:]), 0.125)
    assert relative_error(found, explicit(q, k, v, 0.125)) < 1e-10


def test_where_a_gradient_is_needed_or_another_kernel_asked_for_it_does_not_run(plain_kernels) -> None:
    q, k, v = inputs(8, 8, 2, 2, 64, 64, torch.float32)
    assert fa3.choose_forward(q, k, v) == "fa3"
    with fa3.gradient_to_follow():
        assert fa3.choose_forward(q, k, v) == "torch"
    v.requires_grad_()
    assert fa3.choose_forward(q, k, v) == "torch"
    with torch.no_grad():
        assert fa3.choose_forward(q, k, v) == "fa3"
        with override(fa3.OPERATION, "torch"):
            assert fa3.choose_forward(q, k, v) == "torch"


def test_a_recomputed_layer_runs_both_passes_by_one_kernel(plain_kernels, monkeypatch) -> None:
    """In the first one no gradient is asked for, as in a frozen model's."""
    chosen = []
    layer = types.SimpleNamespace(config=types.SimpleNamespace(fp8=None))

    def forward(x: Tensor) -> tuple[Tensor, None]:
        chosen.append(fa3.choose_forward(x, x, x))
        return x, None

    with torch.no_grad():
        MixerLayer._in_its_precision(layer, forward, torch.zeros(1, 2, 2, 64))
        forward(torch.zeros(1, 2, 2, 64))
    assert chosen == ["torch", "fa3"]


def test_the_check_before_a_run_names_a_wrong_one(plain_kernels, monkeypatch) -> None:
    def checked() -> list[Check]:
        checks = check_kernels(tiny_config("*-"), torch.bfloat16, torch.device("cpu"))
        return [c for c in checks if c.operation == fa3.OPERATION]

    checks = checked()
    assert len(checks) == 2 and all(c.ok and c.implementation == "fa3" and c.where == "output" for c in checks), checks
    right = PlainKernels.flash_attn_varlen_func.__func__
    monkeypatch.setattr(
        PlainKernels, "flash_attn_varlen_func", classmethod(lambda cls, q, *rest, **x: right(cls, q.roll(1, 0), *rest, **x))
    )
    assert [c.shape for c in checked() if not c.ok] == [checks[1].shape] and "documents" in checks[1].shape


def test_what_cannot_run_says_why(monkeypatch) -> None:
    q, k, v = inputs(8, 8, 2, 2, 64, 64, torch.bfloat16)
    assert fa3.choose_forward(q, k, v) == "torch"
    with override(fa3.OPERATION, "fa3_fp8"), pytest.raises(RuntimeError, match="fa3_fp8 was asked for .* needs a CUDA device"):
        attention(q, k, v, 0.125)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(fa3, "import_error", lambda module: "no such module")
    missing = fa3.unsupported(q, k, v)
    assert missing == Unsupported("fa3_fwd_interface does not import: no such module", "pip install fa3-fwd")
    wide = torch.zeros(1, 8, 2, 258, dtype=torch.bfloat16)
    for given, reason in (((q.float(), k, v), "bf16, not float32"), ((wide, wide, v), "up to 256 channels, not 258")):
        found = fa3.unsupported(*given)
        assert found is not None and reason in found.reason and not found.advice
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    found = fa3.unsupported(q, k, v)
    assert found is not None and "Hopper" in found.reason and not found.advice


needs_kernels = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0) or import_error(fa3.MODULE) is not None,
    reason="needs a Hopper GPU and the package fa3-fwd",
)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("kernel", ["fa3", "fa3_fp8"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(40, 47, 32, 8, 128, 128), *SHAPES, *PADDED, (1500, 2000, 9, 3, 64, 64)])
def test_kernels_match_explicit_softmax_in_fp32(kernel, packed, shape) -> None:
    if packed:
        shape = (40, 47, *shape[2:])
    q, k, v = inputs(*shape, torch.bfloat16, "cuda")
    scale = shape[4] ** -0.5
    with override(fa3.OPERATION, kernel):
        found = attention(q, k, v, scale, documents=DOCUMENTS if packed else None)
    assert in_use()[fa3.OPERATION] == kernel and found.dtype == torch.bfloat16
    exact = [x.float() for x in (q, k, v)]
    wanted = by_document(*exact, scale) if packed else explicit(*exact, scale)
    error = relative_error(found, wanted)
    print(kernel, packed, shape, f"{error:.1e}")
    assert error < (1e-2 if kernel == "fa3" else 0.11)  # FP8: its rounding of inputs alone makes up to .08


@pytest.mark.gpu
@needs_kernels
def test_sections_of_a_projection_and_a_prefix_in_blocks_on_gpu() -> None:
    """Values that are a section of a wider tensor, batch 2, and the logarithms by which blocks are merged."""
    q, k, v = (x.expand(2, -1, -1, -1) for x in inputs(200, 900, 8, 2, 128, 256, torch.bfloat16, "cuda"))
    v = v[..., 128:]
    exact = explicit(q.float(), k.float(), v.float(), 0.1)
    assert relative_error(attention(q, k, v, 0.1), exact) < 1e-2
    blocks = ((k[:, part], v[:, part]) for part in (slice(0, 300), slice(300, 700)))
    assert relative_error(blockwise_attention(q, blocks, (k[:, 700:], v[:, 700:]), 0.1), exact) < 1e-2
    assert in_use()[fa3.OPERATION] == "fa3"  # chosen, not asked for
