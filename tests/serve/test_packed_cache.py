"""Sequences of different lengths in one pool of rows, against each sequence alone."""

import re

import pytest
import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.config.layouts import kv_bytes_per_token
from megatron_hylo.hf import HyloCache, attention_hylo
from megatron_hylo.serve import generate, generate_batch, packed_cache
from megatron_hylo.serve.generate_batch import BatchDecoder, Chooser, pool_for
from megatron_hylo.serve.packed_cache import PackedCache, PackedDecodeGraph, decoded_alone, pool_nbytes, tokens_that_fit
from tests.hf.conftest import ALIGNED, random_model, serve_config

CASES = {
    "G+*": serve_config("G+*"),
    "M+": serve_config("M+"),
    "K+": serve_config("K+"),
    "W+": serve_config("W+"),
    "G+*+ pairs, bias": serve_config("G+*+", **ALIGNED["G+*+ pairs, bias"]),
}


def read_prompt(model, cache, ids):
    """Logits of a prompt's pieces."""
    return [model(piece, past_key_values=cache).logits for piece in ids.split(7, dim=1)]


class Batch:
    """A packed cache and the logits of its sequences, which begin, end and move."""

    def __init__(self, model, slots, tokens, latents=None):
        self.model, self.cache = model, PackedCache(model, slots, tokens, latents)
        self.graph = PackedDecodeGraph(model, self.cache)
        self.sequences, self.logits = {}, {}  # slot -> tokens left to read, slot -> logits so far

    def begin(self, ids, prompt, size):
        """Read the first tokens of ids [1, tokens]; returns the slot."""
        slot = self.cache.place(size)
        reader = self.cache.reader(slot)
        pieces = read_prompt(self.model, reader, ids[:, :prompt])
        self.cache.fill(slot, reader)
        self.sequences[slot], self.logits[slot] = ids[0, prompt:].tolist(), pieces
        return slot

    def step(self, count):
        """Read so many tokens of each sequence."""
        for _ in range(count):
            ids = torch.full((self.cache.batch_size, 1), 3, device=self.model.device)
            for slot, left in self.sequences.items():
                ids[slot] = left.pop(0)
            logits = self.graph(ids).clone()
            for slot in self.sequences:
                self.logits[slot].append(logits[slot : slot + 1])

    def end(self, slot):
        """Give a sequence's rows back; returns its logits."""
        self.cache.free(slot)
        del self.sequences[slot]
        return torch.cat(self.logits.pop(slot), 1)


def scenario(model, latents=None):
    """Four sequences in three slots: one ends, one takes its place where the others have to move, all end at other times.

    Returns:
        Of each a sequence [1, tokens], the length of its prompt, and its logits [1, tokens, vocabulary].
    """
    ids = [torch.randint(160, (1, n)).to(model.device) for n in (30, 12, 33, 20)]
    batch = Batch(model, 3, 80, latents)
    first, second = batch.begin(ids[0], 20, 30), batch.begin(ids[1], 1, 12)
    batch.step(3)  # with an empty slot
    third = batch.begin(ids[2], 29, 36)
    assert [e.start for e in batch.cache.extents] == [0, 30, 42] and batch.cache.place(2) is None
    batch.step(4)
    found = [(ids[0][:, :27], 20, batch.end(first)), (ids[1][:, :8], 1, batch.end(second))]
    last = batch.begin(ids[3], 10, 44)  # the gap before the third has 42 rows
    assert batch.cache.extent(third).start == 0 and batch.cache.extent(last).start == 36
    batch.sequences[third] = [7, 8, 9]
    sequence = torch.cat([ids[2], torch.tensor([[7, 8, 9]], device=model.device)], 1)
    batch.step(3)
    with pytest.raises(ValueError, match="has room for 36 tokens and holds as many"):
        batch.graph(torch.zeros(3, 1, dtype=torch.int64, device=model.device))
    return [*found, (sequence, 29, batch.end(third)), (ids[3][:, :13], 10, batch.end(last))]


def errors(model, latents=None):
    """Largest relative error of packed logits against those of each sequence alone."""
    found = []
    for ids, prompt, logits in scenario(model, latents):
        cache = HyloCache(latents=latents)
        pieces = read_prompt(model, cache, ids[:, :prompt])
        alone = torch.cat(pieces + [model(token, past_key_values=cache).logits for token in ids[:, prompt:].split(1, dim=1)], 1)
        found.append(float((logits - alone).float().norm() / alone.float().norm()))
    return max(found)


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
@torch.no_grad()
def test_a_packed_batch_gives_the_logits_of_each_sequence_alone(config):
    """Bf16 rounds what fp32 sums in another order; 8-bit latents are those of the sequence alone."""
    model = random_model(config, torch.float32)
    for latents in (None, "fp8", "int8"):
        assert errors(model, latents) < 1e-5
    assert errors(model.to(torch.bfloat16)) < 2e-2


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@torch.no_grad()
def test_prompts_that_wait_get_the_text_of_transformers_generate(penalty, monkeypatch):
    """Also where keys are made anew in each step, and sequences are decoded one by one out of the same pool."""
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 16)
    for config in (serve_config("G+M*"), serve_config("G+*+", **ALIGNED["G+*+ pairs, bias, aligned q/k-norm"])):
        model = random_model(config)
        prompts = [torch.randint(6, 160, (1, n)) for n in (3, 40, 1, 33, 20)]
        settings = dict(max_new_tokens=9, do_sample=False, pad_token_id=0, repetition_penalty=penalty)
        free = [model.generate(ids, **settings)[0, ids.shape[1] :].tolist() for ids in prompts]
        stop = free[1][3]  # at least one text ends early
        expected = [text[: text.index(stop) + 1] if stop in text else text for text in free]
        decoder = BatchDecoder(model, PackedCache(model, 3, 95), 9, [stop], Chooser(penalty=penalty))
        found = list(decoder.run(prompts))
        assert {s.number: s.new for s in found} == dict(enumerate(expected))
        assert (
            ("q/k-norm" in decoder.decoded_by(None)) == config.qk_layernorm == (decoded_alone(model, decoder.cache) is not None)
        )
        assert all(len(s.times) == 1 + len(s.new) and s.times == sorted(s.times) for s in found)
        with pytest.raises(ValueError, match="a sequence of 109 tokens does not fit in a cache of 95"):
            list(decoder.run([torch.zeros(1, 100, dtype=torch.int64)]))


def test_a_pool_holds_the_sum_of_the_lengths_and_more_than_fits_is_refused(monkeypatch, caplog):
    config = serve_config("G+M*")
    model = random_model(config, torch.bfloat16)
    sizes, row = [10, 500, 20, 30], kv_bytes_per_token(config)
    cache = pool_for(sizes, model, 3, None)
    held = sum(t.untyped_storage().nbytes() for tensors in cache.rows.values() for t in tensors)
    assert held == (500 + 30 + 20 + 1) * row and cache.batch_size == 3
    everything = held + sum(t.nbytes for states in cache.states.values() for t in states)
    assert everything == pool_nbytes(model, 3, 550)
    assert tokens_that_fit(model, 3, everything) == 550 and tokens_that_fit(model, 3, everything - 1) == 549
    for latents in (None, "int8"):
        for module in (packed_cache, generate_batch):
            monkeypatch.setattr(module, "free_bytes", lambda device: everything)
        fit = tokens_that_fit(model, 3, everything, latents)
        with pytest.raises(ValueError, match=f"which hold {fit:,} tokens; use fewer"):
            PackedCache(model, 3, fit + 1, latents)
        most = tokens_that_fit(model, 1, 0.85 * everything, latents)
        with pytest.raises(ConfigError, match=rf"are {most + 1:,} tokens.*it would hold {most:,}; give a shorter"):
            pool_for([most + 1, 3], model, 2, latents)
    assert not caplog.records
    most = tokens_that_fit(model, 1, 0.85 * everything)
    cache = pool_for([most, most], model, 2, None)  # the states of two leave no room for one of them
    assert (cache.batch_size, cache.max_cache_len) == (1, most) and "at most 1 and" in caplog.text


@torch.no_grad()
def test_a_pass_neither_waits_nor_allocates_on_the_host(monkeypatch):
    """A capture refuses copies from the device and host allocations; tests/kernels tests the kernel of attention."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert not re.search(r"_local_scalar_dense|nonzero|equal\.default|item|lift_fresh|masked_select", str(func)), func
            return func(*args, **(kwargs or {}))

    def kernel(q, k, v, *args, **settings):
        assert k.shape[0] == 1
        return q.new_zeros(*q.shape[:2], v if isinstance(v, int) else v.shape[-1])

    model = random_model(serve_config("G+M*K+"), torch.bfloat16)
    batch = Batch(model, 3, 80)
    batch.begin(torch.randint(160, (1, 30)), 20, 30)
    batch.step(1)
    monkeypatch.setattr(attention_hylo, "decode_attention", kernel)
    with Refuse():
        batch.graph._run()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
@torch.no_grad()
def test_a_replayed_graph_follows_sequences_that_come_go_and_move(config):
    for dtype, latents, bound in ((torch.float32, None, 1e-3), (torch.bfloat16, None, 5e-2), (torch.bfloat16, "fp8", 1e-1)):
        model = random_model(config, dtype).cuda()
        for name, parameter in model.named_parameters():
            if name.rsplit(".")[-1] in model._keep_in_fp32_modules_strict:
                parameter.data = parameter.data.float()
        assert errors(model, latents) < bound
        if dtype != torch.float32:
            continue
        prompts = [torch.randint(160, (1, n), device="cuda") for n in (3, 40, 300, 33, 20)]
        found = []
        for captures in (False, True):
            decoder = BatchDecoder(model, PackedCache(model, 3, 400, latents), 40, [], Chooser(), captures)
            found.append({s.number: s.new for s in decoder.run(prompts)})
            assert (decoder.decoded_by(None) == "a CUDA graph") == captures, decoder.decoded_by(None)
        assert found[0] == found[1]


def test_a_prompt_that_was_read_outside_the_pool_is_refused():
    """Tensors made in inference mode cannot be written outside it, so the reader takes rows of its own."""
    model = random_model(CASES["G+*"], torch.float32)
    with torch.inference_mode():
        cache = PackedCache(model, 2, 40)
    slot = cache.place(20)
    reader = cache.reader(slot)
    with torch.no_grad():
        model(torch.randint(160, (1, 5)), past_key_values=reader)
    with pytest.raises(ValueError, match="make and fill it both in torch.inference_mode"):
        cache.fill(slot, reader)


def test_an_iteration_that_is_given_up_leaves_its_slots_free():
    model = random_model(CASES["M+"], torch.float32)
    decoder = BatchDecoder(model, PackedCache(model, 2, 60), 6, (), Chooser())
    prompts = [torch.randint(160, (1, n)) for n in (3, 9, 5)]
    whole = {x.number: x.new for x in decoder.run(prompts)}
    given_up = decoder.run(prompts)
    next(given_up)
    given_up.close()
    assert {x.number: x.new for x in decoder.run(prompts)} == whole
