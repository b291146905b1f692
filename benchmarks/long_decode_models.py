"""Models of long_decode.py: a hybrid of ours and the dense model of transformers, with random weights at real shapes."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from report import architecture, device_name, free_memory
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from megatron_hylo.convert.hf_config import hf_config_from_model
from megatron_hylo.hf import HyloConfig, HyloForCausalLM
from megatron_hylo.hf.attend_hylo import KEYS_AT_ONCE
from megatron_hylo.hf.cache_hylo import HyloCache, cache_nbytes
from megatron_hylo.hf.decode_hylo import DecodeGraph
from megatron_hylo.hf.quantised_hylo import keep_weights_in_fp8
from megatron_hylo.kernels.elementwise import compile_on_request
from megatron_hylo.kernels.quantised_latents import FORMATS
from megatron_hylo.serve.packed_cache import PackedCache, PackedDecodeGraph, pool_nbytes
from megatron_hylo.serve.split_prefill import Ring, split_prefill

Row = dict[str, Any]
BANDWIDTHS = {"H200": 4.8e12, "H100": 3.35e12}  # bytes a second, by NVIDIA's data sheets
SPARE = 160  # rows of a cache after its length
MARGIN = 6 * 2**30  # bytes of the GPU that the largest batch leaves free


class Hybrid:
    """A hybrid of ours with random weights."""

    def __init__(self, name: str) -> None:
        self.name, (layout, *options) = name, name.split("+")
        self.latents = next((option for option in options if option in FORMATS), None)
        self.model = build(lambda c: HyloForCausalLM(HyloConfig(**hf_config_from_model(c, "bfloat16"))), layout)
        kept = self.model._keep_in_fp32_modules_strict or ()
        for key, parameter in self.model.named_parameters():
            if key.rsplit(".", 1)[-1] in kept:
                parameter.data = parameter.data.float()
        if "w8" in options:
            keep_weights_in_fp8(self.model)

    def fitting(self, tokens: int) -> int:
        """Sequences that fit in the memory that is free."""
        free = torch.cuda.mem_get_info()[0] - MARGIN if torch.cuda.is_available() else 2**27
        return max(int(free // cache_nbytes(self.model.config, tokens + SPARE, self.model.dtype.itemsize, self.latents)), 0)

    def cache(self, tokens: int, batch: int) -> HyloCache:
        """A cache that holds so many tokens of zeros, but for its first ones."""
        cache = self.model.new_cache(batch, tokens + SPARE, self.latents)
        ids = torch.randint(self.model.config.vocab_size, (batch, 16), device=self.model.device)
        self.model(ids, past_key_values=cache, logits_to_keep=1)
        for held in (t for tensors in cache.rows.values() for t in tensors):
            held[:, 16:].zero_()
        cache.length, cache.last_position = tokens, cache.last_position.new_full((1, 1), tokens - 1)
        return cache

    def mixed_cache(self, lengths: list[int], packed: bool) -> HyloCache:
        """A cache of zeros that holds sequences of these lengths: packed, or padded on the left to the longest."""
        longest = max(lengths)
        if not packed:
            padded = self.cache(longest, len(lengths))
            counts = torch.tensor(lengths, device=self.model.device)[:, None]
            padded.padding = torch.arange(longest, device=counts.device) >= longest - counts
            padded.last_position = counts - 1
            return padded
        cache = PackedCache(self.model, len(lengths), sum(lengths) + SPARE * len(lengths), self.latents)
        for held in (t for tensors in cache.rows.values() for t in tensors):
            held.zero_()
        for tokens in lengths:
            slot = cache.place(tokens + SPARE)
            assert slot is not None, "the cache was made for them"
            cache.extent(slot).length = tokens
        return cache

    def fitting_mixed(self, spread: Callable[[int], list[int]], packed: bool, most: int) -> int:
        """Sequences of the lengths spread(number) that fit in the memory that is free, `most` at most."""
        free = torch.cuda.mem_get_info()[0] - MARGIN if torch.cuda.is_available() else 2**27
        if not packed:
            return min(most, self.fitting(max(spread(2))))
        fit = (n for n in range(most, 0, -1)
               if pool_nbytes(self.model, n, sum(spread(n)) + SPARE * n, self.latents) <= free)  # fmt: skip
        return next(fit, 0)

    def decode(self, cache: HyloCache, batch: int, steps: int) -> tuple[float, Row]:
        """Seconds of a step, and what it reads."""
        if isinstance(cache, PackedCache):
            graph: DecodeGraph = PackedDecodeGraph(self.model, cache, compiles=True)
        else:
            graph = DecodeGraph(self.model, cache, compiles=True)
        ids = torch.zeros(batch, 1, dtype=torch.int64, device=self.model.device)
        for _ in range(4):
            ids = graph(ids).argmax(-1)
        seconds = timed(lambda: graph(ids).argmax(-1), steps)
        states = sum(t.nbytes for tensors in cache.states.values() for t in tensors)
        held = sum(t.untyped_storage().nbytes() for tensors in cache.rows.values() for t in tensors)
        return seconds, dict(
            cache_bytes=cache.token_nbytes(), held_bytes=held, state_bytes=2 * states, captured=graph.graph is not None,
            kv_bytes_per_token=held / batch / next(iter(cache.rows.values()))[0].shape[1],
        )  # fmt: skip

    def prefill(self, tokens: int, piece: int, steps: int, deadline: float) -> Iterator[Row]:
        """Read a prompt in pieces; a row at each power of two of tokens from a piece on, then decode after it."""
        with compile_on_request():  # kernels are compiled and tuned, and attention has planned every size of a block
            warm = min(tokens, 2 * KEYS_AT_ONCE)
            cache = self.model.new_cache(1, warm + piece, self.latents)
            for _ in range(0, warm, piece):
                self.model(self.ids(piece), past_key_values=cache, logits_to_keep=1)
        del cache
        free_memory()
        cache = self.model.new_cache(1, tokens + SPARE, self.latents)
        if dist.is_initialized() and dist.get_world_size() > 1:
            yield self.split_prefill(cache, tokens, piece)
        else:
            yield from self.read(cache, tokens, piece, deadline)
        if cache.length == tokens:
            seconds, about = self.decode(cache, 1, min(steps, SPARE - 8))
            yield decode_result(self, "decode, prefilled", tokens, 1, seconds, about)

    def split_prefill(self, cache: HyloCache, tokens: int, piece: int) -> Row:
        """Read a prompt on all ranks together."""
        ring, ids = Ring(self.model.device), self.ids(tokens)
        dist.broadcast(ids, 0)
        synchronise()
        dist.barrier()
        start = begun = time.perf_counter()
        with compile_on_request():
            for done in split_prefill(self.model, ids, cache, piece, ring):
                if time.perf_counter() - begun > 20 and ring.rank == 0:
                    begun = time.perf_counter()
                    print(f"{done:,} of {tokens:,} tokens, {begun - start:.0f} s", flush=True)
        synchronise()
        spent = time.perf_counter() - start
        ring.close()
        return dict(model=self.name, what=f"prefill, {ring.size} GPUs", tokens=tokens, batch=1, seconds=spent, piece=piece,
                    tokens_per_second=tokens / spent, peak_gib=peak_gib(),
                    kv_bytes_per_token=cache.token_nbytes() / tokens)  # fmt: skip

    def read(self, cache: HyloCache, tokens: int, piece: int, deadline: float) -> Iterator[Row]:
        """Read a prompt; a row at each power of two of tokens."""
        synchronise()
        start = begun = time.perf_counter()
        for first in range(0, tokens, piece):
            ids = self.ids(min(piece, tokens - first))
            with compile_on_request():
                logits = self.model(ids, past_key_values=cache, logits_to_keep=1).logits
            done = cache.length
            if done & (done - 1) == 0 or done == tokens:
                logits.argmax(-1)
                synchronise()
                spent = time.perf_counter() - start
                yield dict(model=self.name, what="prefill", tokens=done, batch=1, seconds=spent, tokens_per_second=done / spent,
                           peak_gib=peak_gib(), kv_bytes_per_token=cache.token_nbytes() / done, piece=piece)  # fmt: skip
            if time.perf_counter() - begun > 20:
                synchronise()
                begun = time.perf_counter()
                left = (begun - start) * ((tokens / done) ** 2 - 1)
                print(f"{done:,} of {tokens:,} tokens, {begun - start:.0f} s, at most {left:.0f} s left", flush=True)
            if time.monotonic() > deadline:
                print(f"--minutes are over after {done:,} tokens", flush=True)
                return

    def ids(self, count: int) -> torch.Tensor:
        """Random tokens [1, count]."""
        return torch.randint(self.model.config.vocab_size, (1, count), device=self.model.device)


class Dense:
    """The dense model of transformers (SDPA) with random weights."""

    latents = None

    def __init__(self, name: str) -> None:
        self.name = name

        def make(config: Any) -> Any:
            values = hf_config_from_model(config, "bfloat16")
            return AutoModelForCausalLM.from_config(
                AutoConfig.for_model(values.pop("model_type"), **values), attn_implementation="sdpa"
            )

        self.model = build(make, name)
        c = self.model.config
        self.kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * self.model.dtype.itemsize

    def fitting(self, tokens: int) -> int:
        """Sequences that fit; each step copies a layer's keys and values."""
        free = torch.cuda.mem_get_info()[0] - MARGIN if torch.cuda.is_available() else 2**27
        return max(int(free // (self.kv * tokens * (1 + 1 / self.model.config.num_hidden_layers))), 0)

    def cache(self, tokens: int, batch: int) -> DynamicCache:
        """A cache of zeros."""
        c, cache = self.model.config, DynamicCache(config=self.model.config)
        for layer in range(c.num_hidden_layers):
            shape = (batch, c.num_key_value_heads, tokens, c.head_dim)
            key, value = (torch.zeros(shape, dtype=self.model.dtype, device=self.model.device) for _ in range(2))
            cache.update(key, value, layer)
        return cache

    def decode(self, cache: DynamicCache, batch: int, steps: int) -> tuple[float, Row]:
        """Seconds of a step, and what it reads."""
        ids = torch.zeros(batch, 1, dtype=torch.int64, device=self.model.device)

        def step() -> None:
            self.model(ids, past_key_values=cache, use_cache=True).logits.argmax(-1)

        step()
        seconds = timed(step, max(steps // 4, 2))
        held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        return seconds, dict(cache_bytes=held, state_bytes=0, kv_bytes_per_token=held / batch / cache.get_seq_length())

    def prefill(self, tokens: int, piece: int, steps: int, deadline: float) -> Iterator[Row]:
        """Read prompts of each power of two in one pass, until one does not fit."""
        length, spent = min(8192, tokens), 0.0
        out: Any = None
        while length <= tokens:
            if time.monotonic() + 4 * spent > deadline:
                print(f"--minutes are over before {length:,} tokens of {self.name}", flush=True)
                return
            free_memory()
            try:
                for _ in range(2 if spent < 2 else 1):  # attention's kernels are chosen in the first
                    out = None
                    synchronise()
                    start = time.perf_counter()
                    out = self.model(self.ids(length), use_cache=True, logits_to_keep=1)
                    out.logits.argmax(-1)
                    synchronise()
                    spent = time.perf_counter() - start
            except torch.OutOfMemoryError:
                yield dict(model=self.name, what="prefill", tokens=length, out_of_memory=True)
                return
            held = sum(t.nbytes for layer in out.past_key_values.layers for t in (layer.keys, layer.values))
            yield dict(model=self.name, what="prefill", tokens=length, batch=1, seconds=spent, tokens_per_second=length / spent,
                       peak_gib=peak_gib(), kv_bytes_per_token=held / length)  # fmt: skip
            length *= 2

    def ids(self, count: int) -> torch.Tensor:
        """Random tokens [1, count]."""
        return torch.randint(self.model.config.vocab_size, (1, count), device=self.model.device)


def build(make: Any, name: str) -> Any:
    """A model of a named shape with random weights on the device, bf16 (fp32 on a CPU)."""
    cuda = torch.cuda.is_available()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if cuda else torch.float32)
    try:
        with torch.device("cuda" if cuda else "cpu"):
            return make(architecture(name)).eval()
    finally:
        torch.set_default_dtype(before)


def decode_result(model: Any, what: str, tokens: int, batch: int, seconds: float, about: Row) -> Row:
    """The row of a measured step."""
    weights = sum(p.nbytes for name, p in model.model.named_parameters() if "embed_tokens" not in name)
    if model.model.config.tie_word_embeddings:
        weights += model.model.get_input_embeddings().weight.nbytes
    read = weights + about["cache_bytes"] + about["state_bytes"]
    return dict(model=model.name, what=what, tokens=tokens, batch=batch, seconds=seconds, tokens_per_second=batch / seconds,
                gb_a_step=read / 1e9, bandwidth_share=read / seconds / bandwidth(), peak_gib=peak_gib(), **about)  # fmt: skip


def bandwidth() -> float:
    """Bytes a second that the GPU's memory has; a nominal 20 GB/s for a CPU."""
    return next((rate for name, rate in BANDWIDTHS.items() if name in device_name()), 20e9)


def peak_gib() -> float:
    """Peak memory of tensors, GiB."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def synchronise() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(step: Any, count: int) -> float:
    """Seconds of a step, the mean of so many."""
    synchronise()
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronise()
    return (time.perf_counter() - start) / count
