"""Generation for many prompts of different lengths, decoded together by one hybrid.

Prompts are read one after the other, in their order, into a packed cache (packed_cache.py), as many as it has slots and room
for; all that are in it advance by a token a pass. One that ends gives its slot and rows to the next prompt. For texts that are
all there at the start: a server, with arrivals, priorities and preemption, is vLLM (docs/serving.md).
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.hf import HyloForCausalLM
from megatron_hylo.hf.cache_hylo import cache_nbytes, free_bytes
from megatron_hylo.serve import generate
from megatron_hylo.serve.generate import (
    DECODE,
    Generation,
    check_latents,
    not_captured,
    open_for_generation,
    prompt_ids,
    stop_tokens,
    warn_of_length,
)
from megatron_hylo.serve.packed_cache import PackedCache, PackedDecodeGraph, decoded_alone, tokens_that_fit
from megatron_hylo.serve.requests import check_prompt, check_settings
from megatron_hylo.serve.text_sampler import choose_tokens

logger = logging.getLogger("megatron_hylo.serve")
MEMORY_SHARE = 0.85  # of the free memory that the cache may take; the rest is for the activations of a piece of a prompt


def generate_texts(
    path: str | Path,
    prompts: Sequence[str],
    batch: int = 32,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    latents: Literal["int8", "fp8"] | None = None,
    weights: Literal["fp8"] | None = None,
    cuda_graphs: bool = True,
    on_result: Callable[[int, Generation], None] = lambda number, result: None,
) -> list[Generation]:
    """Continue many prompts, up to `batch` of them decoded together; the cache holds the sum of their lengths.

    Args:
        path: model folder, training checkpoint or exported folder of a hybrid.
        prompts: texts to continue, of any lengths.
        batch: sequences in memory at most; fewer where their tokens do not fit.
        max_new_tokens, temperature, top_p, repetition_penalty, chat, latents, weights: as in `generate_text`.
        seed: of the sampling; with a temperature above 0 a text depends on those it is decoded with.
        cuda_graphs: on a GPU capture the pass as a CUDA graph, from `CAPTURED_TOKENS` new tokens on.
        on_result: called with a prompt's number and its result as it ends, in the order of their ends.

    Returns:
        Results in the prompts' order. `cache_bytes` is a sequence's share of the cache.

    Raises:
        ConfigError: as in `generate_text`; another model than a hybrid; a prompt for which alone the memory is too small.
    """
    for prompt in prompts:
        check_prompt(prompt)
    check_settings(max_new_tokens, temperature, top_p, repetition_penalty)
    if batch < 1 or not prompts:
        raise ConfigError(f"need a prompt and batch >= 1, got {len(prompts)} prompts and {batch}")
    model, tokenizer = open_for_generation(path, weights)
    check_latents(model, path, latents)
    if not isinstance(model, HyloForCausalLM):
        raise ConfigError(
            f"{path} is a model of transformers, and only hybrids decode many prompts here; give it one at a time"
        )
    ids = [prompt_ids(model, tokenizer, path, prompt, chat) for prompt in prompts]
    warn_of_length(model, path, max(x.shape[1] for x in ids), max_new_tokens)
    cache = pool_for([x.shape[1] + max_new_tokens for x in ids], model, batch, latents)
    reason = not_captured(model, max_new_tokens if cuda_graphs else 0)
    decoder = BatchDecoder(
        model, cache, max_new_tokens, stop_tokens(model, tokenizer), Chooser(temperature, top_p, repetition_penalty, seed),
        captures=reason is None,
    )  # fmt: skip
    states, row = (cache_nbytes(model.config, n, model.dtype.itemsize, latents) for n in (0, 1))
    found: dict[int, Generation] = {}
    for sequence in decoder.run(ids):
        times, cached = sequence.times, sequence.prompt.shape[1] + len(sequence.new) - 1
        number = sequence.number
        found[number] = Generation(
            text=tokenizer.decode(sequence.new, **DECODE),
            prompt_tokens=sequence.prompt.shape[1],
            new_tokens=len(sequence.new),
            prefill_seconds=times[1] - times[0],
            tokens_per_second=(len(times) - 2) / (times[-1] - times[1]) if len(times) > 2 else 1 / (times[1] - times[0]),
            cache_bytes=states + cached * (row - states),
            kv_bytes_per_token=row - states,
            decoded_by=decoder.decoded_by(reason),
        )
        on_result(number, found[number])
    return [found[number] for number in range(len(prompts))]


def pool_for(sizes: Sequence[int], model: HyloForCausalLM, batch: int, latents: str | None) -> PackedCache:
    """Make a cache for sequences of at most these sizes, `batch` of them at a time, or as many as the memory holds.

    Raises:
        ConfigError: it does not hold the longest one; an unknown format of latents.
    """
    slots, longest = min(batch, len(sizes)), max(sizes)
    wanted = sum(sorted(sizes)[-slots:])
    free = free_bytes(model.device)
    if free is not None:
        memory = MEMORY_SHARE * free
        if longest > (most := tokens_that_fit(model, 1, memory, latents)):
            raise ConfigError(
                f"the longest prompt and its new tokens are {longest:,} tokens, but {free / 2**30:.1f} GiB of the memory are "
                f"free, of which the cache may take {MEMORY_SHARE:.0%}: it would hold {most:,}; give a shorter prompt"
                + ("" if latents else ", or latents 'fp8'")
            )
        while (fit := tokens_that_fit(model, slots, memory, latents)) < longest:  # states alone take too much
            slots -= 1
        if fit < wanted or slots < min(batch, len(sizes)):
            logger.warning(
                "%s sequences of up to %s tokens in all do not fit in %.1f GiB of free memory: at most %s and %s at a time",
                f"{min(batch, len(sizes)):,}", f"{wanted:,}", free / 2**30, f"{slots:,}", f"{fit:,} tokens",
            )  # fmt: skip
        wanted = min(wanted, fit)
    try:
        return PackedCache(model, slots, wanted, latents)
    except ValueError as error:
        raise ConfigError(str(error)) from error


@dataclass
class Chooser:
    """Chooses next tokens; logits of tokens that are there already are made smaller by a penalty (CTRL, arXiv:1909.05858)."""

    temperature: float = 0.0
    top_p: float = 1.0
    penalty: float = 1.0
    seed: int = 0
    generator: torch.Generator | None = None

    def __call__(self, logits: Tensor, there: Tensor | None) -> Tensor:
        """Choose a token a row: logits [rows, vocabulary] and bool of the same shape, tokens that are there -> int64 [rows]."""
        if self.generator is None:
            self.generator = torch.Generator(logits.device).manual_seed(self.seed)
        if there is not None:
            logits = torch.where(there, torch.where(logits < 0, logits * self.penalty, logits / self.penalty), logits)
        return choose_tokens(logits, self.temperature, self.top_p, self.generator)


@dataclass
class SequenceState:
    """A prompt and its continuation."""

    number: int
    prompt: Tensor  # int64 [1, tokens]
    new: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # seconds: its beginning, then each new token


class BatchDecoder:
    """Continues prompts with a packed cache.

    Args:
        model: in eval mode.
        cache: empty.
        max_new_tokens: of each sequence.
        stop: tokens that end one.
        choose: next tokens of logits.
        captures: whether passes on a GPU are captured as a CUDA graph.
    """

    def __init__(
        self, model: HyloForCausalLM, cache: PackedCache, max_new_tokens: int, stop: Sequence[int], choose: Chooser,
        captures: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.cache, self.max_new_tokens, self.stop, self.choose = model, cache, max_new_tokens, set(stop), choose
        self.alone = decoded_alone(model, cache)
        self.graph = None if self.alone else PackedDecodeGraph(model, cache, captures=captures)
        slots = cache.batch_size
        self.tokens = torch.zeros(slots, 1, dtype=torch.int64, device=model.device)  # the last one of each sequence
        self.there: Tensor | None = None  # bool [slots, vocabulary], tokens of each sequence, where they have a penalty
        if choose.penalty != 1:
            self.there = torch.zeros(slots, model.config.vocab_size, dtype=torch.bool, device=model.device)
        self.running: dict[int, SequenceState] = {}  # by slot

    def decoded_by(self, reason: str | None) -> str:
        """Say by what passes ran: "a CUDA graph", or single kernels and why."""
        if self.alone:
            return f"single kernels, each sequence by itself ({self.alone})"
        assert self.graph is not None
        if self.graph.graph is not None:
            return "a CUDA graph"
        return f"single kernels ({reason or self.graph.failure or 'it ended before'})"

    @torch.no_grad()
    def run(self, prompts: Sequence[Tensor]) -> Iterator[SequenceState]:
        """Continue prompts, int64 [1, tokens] each; yields each sequence as it ends.

        Raises:
            ValueError: the cache is too small for one.
        """
        waiting = deque(SequenceState(number, ids) for number, ids in enumerate(prompts))
        try:
            while waiting or self.running:
                while waiting and (slot := self.cache.place(waiting[0].prompt.shape[1] + self.max_new_tokens)) is not None:
                    self.running[slot] = sequence = waiting.popleft()
                    self._take(self._read(slot, sequence), [slot])
                    if self._ended(slot):
                        yield self.running.pop(slot)
                if not self.running:
                    if waiting:
                        need = waiting[0].prompt.shape[1] + self.max_new_tokens
                        raise ValueError(
                            f"a sequence of {need:,} tokens does not fit in a cache of {self.cache.max_cache_len:,}"
                        )
                    return
                slots = sorted(self.running)
                self._take(self._step(slots), slots)
                for slot in slots:
                    if self._ended(slot):
                        yield self.running.pop(slot)
        finally:  # an iteration that is given up leaves nothing behind
            for slot in self.running:
                self.cache.free(slot)
            self.running.clear()

    def _read(self, slot: int, sequence: SequenceState) -> Tensor:
        """Read a prompt into its slot; returns logits [1, vocabulary]."""
        sequence.times.append(time.perf_counter())
        reader = self.cache.reader(slot)
        for piece in sequence.prompt.split(generate.PREFILL_TOKENS, dim=1):
            logits = self.model(piece, past_key_values=reader, logits_to_keep=1).logits
        self.cache.fill(slot, reader, alone=self.alone is not None)
        if self.there is not None:
            self.there[slot] = False
            self.there[slot, sequence.prompt[0]] = True
        return logits[:, -1]

    def _step(self, slots: list[int]) -> Tensor:
        """Read the last tokens of these slots' sequences, all that there are; returns logits [slots, vocabulary]."""
        if self.graph is not None:
            return self.graph(self.tokens)[slots, -1]
        found = []
        for slot in slots:
            cache = self.cache.extent(slot).alone
            hidden = self.model.model(self.tokens[slot : slot + 1], past_key_values=cache).last_hidden_state
            found.append(self.model.lm_head(hidden[:, -1]))  # by the backbone, which captures no graph for each sequence
        self.cache.grow()
        return torch.cat(found)

    def _take(self, logits: Tensor, slots: list[int]) -> None:
        """Append a token to each of these slots' sequences."""
        chosen = self.choose(logits, None if self.there is None else self.there[slots])
        self.tokens[slots] = chosen[:, None]
        if self.there is not None:
            self.there[slots, chosen] = True
        for slot, token in zip(slots, chosen.tolist()):
            self.running[slot].new.append(token)
            self.running[slot].times.append(time.perf_counter())

    def _ended(self, slot: int) -> bool:
        """Whether a sequence has come to its end; its slot and rows are free then."""
        sequence = self.running[slot]
        ended = len(sequence.new) == self.max_new_tokens or sequence.new[-1] in self.stop
        if ended:
            self.cache.free(slot)
        return ended
