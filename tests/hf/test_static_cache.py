"""Caches of fixed size and the decode step with fixed shapes, against the cache that grows and full forwards."""

import re

import pytest
import torch

from megatron_hylo.config import RopeScaling
from megatron_hylo.config.layouts import kv_bytes_per_token
from megatron_hylo.hf import HyloCache, attend_hylo, fused_hylo
from megatron_hylo.hf.cache_hylo import cache_nbytes
from megatron_hylo.hf.decode_hylo import DecodeGraph, join_projections, unsupported
from megatron_hylo.kernels.matvec import matvec
from tests.hf.conftest import ALIGNED, YARN, random_model, serve_config

CASES = {
    "*": serve_config("*"),
    "+": serve_config("+"),
    "M": serve_config("M"),
    "G": serve_config("G"),
    "K": serve_config("K"),
    "WW": serve_config("WW"),
    "G+M* q/k-norm, yarn": serve_config("G+M*", qk_layernorm=True, mla_rope_scaling=RopeScaling(**YARN)),
    "G+*+ pairs, bias": serve_config("G+*+", **ALIGNED["G+*+ pairs, bias"]),
    "aligned": serve_config("G+*+", **ALIGNED["G+*+ pairs, bias, aligned q/k-norm"]),
}
cases = pytest.mark.parametrize("config", CASES.values(), ids=CASES)


def fixed(model):
    """The model, which decodes with fixed shapes on the CPU too."""
    model.decodes_with_fixed_shapes = True
    return model


@cases
@torch.no_grad()
def test_every_way_to_read_with_a_fixed_size_gives_the_full_forwards_logits(config, ids, monkeypatch):
    """Pieces, tokens with and without fixed shapes, a padded batch; more latents than are expanded at a time."""
    monkeypatch.setattr(attend_hylo, "KEYS_AT_ONCE", 16)
    monkeypatch.setattr(attend_hylo, "MASK_ELEMENTS", 100)
    model, ids = random_model(config), ids[:, :40]
    mask = torch.ones(2, 47, dtype=torch.long)
    mask[0, :7] = mask[1, 7:9] = 0
    padded = torch.cat([torch.full((2, 7), 5), ids], 1)
    for tokens, seen in ((ids, None), (padded, mask)):
        whole = model(tokens, attention_mask=seen, use_cache=False)
        whole = whole.logits if seen is None else whole.logits[seen.bool()]
        total = tokens.shape[1]
        for by_graph in (False, True):
            model.decodes_with_fixed_shapes = by_graph
            for pieces in ([13, 1, total - 14], [30] + [1] * (total - 30)):
                cache, logits, done = HyloCache(max_cache_len=total + 3), [], 0
                for piece in tokens.split(pieces, dim=1):
                    done += piece.shape[1]
                    given = None if seen is None else seen[:, :done]
                    logits.append(model(piece, attention_mask=given, past_key_values=cache).logits)
                found = torch.cat(logits, 1) if seen is None else torch.cat(logits, 1)[seen.bool()]
                torch.testing.assert_close(found, whole, rtol=0, atol=1e-5, msg=f"{by_graph} {pieces} {seen is not None}")
                assert (cache.graph is not None) == by_graph and cache.get_seq_length() == total
    assert torch.isfinite(torch.cat(logits, 1)).all()


@pytest.mark.parametrize("mixers", ["G+M", "*K"])
@torch.no_grad()
def test_products_of_one_vector_give_the_full_forwards_logits(mixers, ids, monkeypatch):
    """Maps of one token's vector, joined and with SwiGLU and residual, as on a GPU."""
    products = []
    monkeypatch.setattr(fused_hylo, "one_vector", lambda x: x.numel() == x.shape[-1])
    monkeypatch.setattr(fused_hylo, "matvec", lambda x, *args, **settings: products.append(x) or matvec(x, *args, **settings))
    model = fixed(random_model(serve_config(mixers)))
    whole = model(ids[:1], use_cache=False).logits
    join_projections(model)
    cache = model.new_cache(1, 75)
    logits = [model(ids[:1, :70], past_key_values=cache).logits]
    for token in ids[:1, 70:].split(1, dim=1):
        logits.append(model(token, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=0, atol=1e-5)
    assert len(products) >= 5 * (4 * len(mixers) + 1)  # the inputs', outputs' and two of the MLP's, and the head


@pytest.mark.parametrize("by_graph", [False, True])
@torch.no_grad()
def test_generate_with_a_static_cache_gives_the_growing_caches_text(by_graph, ids):
    model = random_model(serve_config("G+M*"), torch.float32)
    model.decodes_with_fixed_shapes = by_graph
    tokens, mask = ids[:, :20].clamp(min=1), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    for settings in (dict(), dict(attention_mask=mask), dict(num_beams=3), dict(prefill_chunk_size=6), dict(do_sample=True)):
        settings = dict(max_new_tokens=8, do_sample=False, pad_token_id=0) | settings
        found = []
        for cache in (dict(), dict(cache_implementation="static")):
            torch.manual_seed(0)
            found.append(model.generate(tokens, return_dict_in_generate=True, **settings, **cache))
        assert torch.equal(found[0].sequences, found[1].sequences), settings
        assert (found[1].past_key_values.graph is not None) == by_graph


@torch.no_grad()
def test_rows_are_rank_plus_rope_numbers_in_the_models_dtype_and_nothing_else(ids):
    config = serve_config("G+M*+")
    model = fixed(random_model(config, torch.bfloat16))
    cache = model.new_cache(2, 60)
    model(ids[:, :30], past_key_values=cache)
    places = [t.data_ptr() for tensors in (*cache.rows.values(), *cache.states.values()) for t in tensors]
    for token in ids[:, 30:60].split(1, dim=1):
        model(token, past_key_values=cache)
    held = [t for tensors in cache.rows.values() for t in tensors]
    assert sum(t.untyped_storage().nbytes() for t in held) == 2 * 60 * kv_bytes_per_token(config) == cache.token_nbytes()
    assert cache.nbytes() == 2 * cache_nbytes(model.config, 60, 2)
    assert places == [t.data_ptr() for tensors in (*cache.rows.values(), *cache.states.values()) for t in tensors]
    everything = {name: t for name, t in vars(cache).items() if isinstance(t, torch.Tensor)}
    everything |= {
        f"graph.{name}": t for name, t in vars(cache.graph).items() if isinstance(t, torch.Tensor) and name != "logits"
    }
    assert sum(t.numel() for t in everything.values()) < 10, everything  # positions, masks: none that grows
    for name in ("int8", "fp8"):
        cache = model.new_cache(2, 60, latents=name)
        model(ids[:, :60], past_key_values=cache)
        expected = 2 * 60 * sum((24 + 6) + 4 if m == "+" else 2 * 2 * 16 * 2 for m in "+*+")
        assert sum(t.untyped_storage().nbytes() for tensors in cache.rows.values() for t in tensors) == expected
        assert cache.nbytes() == 2 * cache_nbytes(model.config, 60, 2, name)


@pytest.mark.parametrize("latents, bound", [("int8", 0.03), ("fp8", 0.12)])
@torch.no_grad()
def test_8_bit_latents_change_logits_by_their_rounding(latents, bound, ids, monkeypatch):
    monkeypatch.setattr(attend_hylo, "KEYS_AT_ONCE", 16)
    model, ids = fixed(random_model(serve_config("G+*+"))), ids[:, :60]
    whole = model(ids, use_cache=False).logits
    results = []
    for length in (None, 60):
        cache, logits = HyloCache(length, latents), []
        for piece in ids.split([20, 30] + [1] * 10, dim=1):
            logits.append(model(piece, past_key_values=cache).logits)
        results.append(torch.cat(logits, 1))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-9)
    beams = dict(max_new_tokens=4, num_beams=2, do_sample=False, pad_token_id=0)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :5] = 0
    monkeypatch.setattr(attend_hylo, "MASK_ELEMENTS", 100)
    texts = [
        model.generate(ids[:, :30].clamp(min=1), attention_mask=mask, past_key_values=HyloCache(length, latents), **beams)
        for length in (None, 40)
    ]
    assert torch.equal(*texts)
    error = float((results[0] - whole).norm() / whole.norm())
    assert 1e-4 < error < bound


@torch.no_grad()
def test_a_pass_of_fixed_shapes_neither_waits_nor_allocates_on_the_host(ids):
    """Refused by a capture: a number read from the device, a tensor of Python numbers, a copy between devices."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = str(func)
            assert not re.search(
                r"_local_scalar_dense|nonzero|is_nonzero|equal\.default|item|lift_fresh|masked_select", name
            ), name
            return func(*args, **(kwargs or {}))

    for config, latents in ((serve_config("G+M*K+"), None), (CASES["aligned"], None), (CASES["aligned"], "fp8")):
        model = random_model(config, torch.bfloat16)
        cache = HyloCache(40, latents)
        mask = torch.ones(2, 20, dtype=torch.long)
        mask[0, :4] = 0
        model(ids[:, :20], attention_mask=mask, past_key_values=cache)
        graph = DecodeGraph(model, cache)
        graph(ids[:, 20:21])
        graph._follow()
        with Refuse():
            graph._run()


@pytest.mark.parametrize(("error", "kind"), [("full", torch.OutOfMemoryError), ("no capture", RuntimeError)])
@torch.no_grad()
def test_a_full_memory_ends_a_capture_and_other_failures_leave_single_kernels(ids, monkeypatch, error, kind):
    """Whoever chose the batch can halve it; a graph that cannot be captured at all is no reason to stop."""

    def capture(*given, **settings):
        raise kind(error)

    model, cache = random_model(serve_config("G+")), HyloCache(40)
    model(ids[:, :20], past_key_values=cache)
    graph = DecodeGraph(model, cache)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    graph._follow()
    graph.ids.copy_(ids[:, 20:21])
    if kind is torch.OutOfMemoryError:
        with pytest.raises(torch.OutOfMemoryError, match="full"):
            graph._capture()
        return
    graph._capture()
    assert graph.failure == "no capture"
    torch.testing.assert_close(graph.logits, model(ids[:, :21], use_cache=False).logits[:, -1:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_a_fixed_size_cannot_do_is_refused(ids):
    model = random_model(serve_config("G+"))
    cache = HyloCache(max_cache_len=30)
    model(ids[:, :28], past_key_values=cache)
    with pytest.raises(ValueError, match=r"room for 30 tokens \(max_cache_len\), holds 28 and is given 3 more"):
        model(ids[:, 28:31], past_key_values=cache)
    for wrong in (dict(max_cache_len=0), dict(latents="int4")):
        with pytest.raises(ValueError, match="at least 1|use 'int8', 'fp8' or None"):
            HyloCache(**wrong)
    assert unsupported(model, HyloCache()) == "the cache grows"
    with pytest.raises(ValueError, match="positions start at 0"):
        model(ids[:, :2], position_ids=torch.tensor([[-3, -2]]))


@torch.no_grad()
def test_a_cropped_or_eagerly_continued_cache_decodes_on(ids):
    model = fixed(random_model(serve_config("*+")))
    whole = model(ids[:, :40], use_cache=False).logits
    cache = HyloCache(max_cache_len=50)
    model(ids[:, :20], past_key_values=cache)
    for token in ids[:, 20:26].split(1, dim=1):
        model(token, past_key_values=cache)
    cache.crop(-3)
    logits = [model(ids[:, 23:24], past_key_values=cache).logits, model(ids[:, 24:30], past_key_values=cache).logits]
    cache.reorder_cache(torch.tensor([1, 0]))
    logits += [model(token, past_key_values=cache).logits.flip(0) for token in ids[:, 30:40].flip(0).split(1, dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), whole[:, 23:], rtol=0, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "config, latents",
    [
        *((config, None) for config in CASES.values()),
        (serve_config("G+M*K"), None),
        (CASES["+"], "fp8"),
        (CASES["aligned"], "int8"),
    ],
    ids=[*CASES, "G+M*K", "+ fp8", "aligned int8"],
)
@torch.no_grad()
def test_a_replayed_graph_gives_the_eager_tokens(config, latents, ids):
    ids = ids.cuda()
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    for dtype, bound in ((torch.float32, 1e-3), (torch.bfloat16, 5e-2)):
        model = random_model(config, dtype).cuda()
        for name, parameter in model.named_parameters():
            if name.rsplit(".")[-1] in model._keep_in_fp32_modules_strict:
                parameter.data = parameter.data.float()
        for settings in (dict(), dict(attention_mask=mask)):
            settings |= dict(
                max_new_tokens=24, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
            )
            eager = model.generate(ids, past_key_values=HyloCache(latents=latents), **settings)
            static = model.generate(ids, past_key_values=model.new_cache(2, ids.shape[1] + 24, latents), **settings)
            graph = static.past_key_values.graph
            assert graph.graph is not None and graph.passes == 23
            first, second = (torch.stack(found.logits).float() for found in (eager, static))
            if dtype == torch.float32:
                assert torch.equal(eager.sequences, static.sequences)
            steps = int((eager.sequences != static.sequences).any(0).float().argmax()) or eager.sequences.shape[1]
            same = steps - ids.shape[1]  # in bf16 a near tie may end the comparison
            assert float((first - second)[:same].norm() / first[:same].norm()) < bound
