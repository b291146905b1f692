"""Generation with a carried cache, out of a Megatron model folder, an exported Hugging Face folder or a GGUF file."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Literal

import torch
import torch.distributed as dist
from jinja2 import TemplateError
from transformers import GenerationConfig, TextStreamer

from megatron_hylo.config import ConfigError
from megatron_hylo.config.mixers import MLA_SYMBOL
from megatron_hylo.convert.open_model import open_model
from megatron_hylo.hf import HyloCache, HyloForCausalLM
from megatron_hylo.hf.decode_hylo import unsupported
from megatron_hylo.hf.pretrained_hylo import length_warning
from megatron_hylo.hf.quantised_hylo import keep_weights_in_fp8
from megatron_hylo.serve.requests import check_prompt, check_settings
from megatron_hylo.serve.split_prefill import Ring, split_prefill

logger = logging.getLogger("megatron_hylo.serve")
PREFILL_TOKENS = 8192  # longer prompts are read in pieces of so many, to bound the memory of activations
CAPTURED_TOKENS = 32  # new tokens from which capturing the decode step on a GPU pays
DECODE = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)  # cleaning up would drop spaces


@dataclass(frozen=True)
class Generation:
    """A continuation and what it cost."""

    text: str  # without the prompt
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float  # until the first new token
    tokens_per_second: float  # of the tokens after the first; of the first one where there is no other
    cache_bytes: int  # at the end, everything that is carried
    kv_bytes_per_token: int  # of that, what each token adds, which a sliding window does not; 0 without attention layers
    decoded_by: str  # "a CUDA graph", or "single kernels" and why


class _Streamer(TextStreamer):
    """Hands finished text on and keeps the time of every token."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, **DECODE)
        self.on_text = on_text
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with each new token."""
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with text that later tokens will not change."""
        self.on_text(text)


def generate_text(
    path: str | Path,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    latents: Literal["int8", "fp8"] | None = None,
    weights: Literal["fp8"] | None = None,
    cuda_graphs: bool = True,
    on_text: Callable[[str], None] = lambda text: None,
) -> Generation:
    """Continue a prompt until the end-of-sequence token or `max_new_tokens`.

    On several ranks (torchrun) each opens the model; a hybrid's long prompt is read by all of them together, in turn, and every
    rank then decodes the same text.

    Args:
        path: model folder, training checkpoint, Hugging Face folder (exported hybrid or teacher), or .gguf file.
        prompt: text to continue.
        max_new_tokens: tokens at most.
        temperature: 0 takes the most likely token each time; else logits are divided by it and sampled from.
        top_p: sample from the most likely tokens that hold this much probability.
        repetition_penalty: > 1 makes tokens that are there already less likely (CTRL, arXiv:1909.05858); small models repeat
            themselves without.
        seed: of the sampling.
        chat: wrap the prompt in the tokenizer's chat template as the user's turn.
        latents: keep MLA's latents in 8 bits in the cache; a hybrid's alone.
        weights: keep the weights of mixers and MLPs in FP8, rounded to the nearest values; a hybrid's alone.
        cuda_graphs: on a GPU capture the decode step as a CUDA graph, from `CAPTURED_TOKENS` new tokens on; a hybrid's alone.
        on_text: called with each piece of text as it is finished.

    Raises:
        ConfigError: a setting outside its range, a prompt that is empty or no text, no chat template or one that refuses the
            prompt, nothing loadable at `path`, a cache larger than the free memory.
    """
    check_prompt(prompt)
    check_settings(max_new_tokens, temperature, top_p, repetition_penalty)
    model, tokenizer = open_for_generation(path, weights)
    ids = prompt_ids(model, tokenizer, path, prompt, chat)
    warn_of_length(model, path, ids.shape[1], max_new_tokens)
    streamer = _Streamer(tokenizer, on_text)
    stop = stop_tokens(model, tokenizer)
    sampling = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=0) if temperature > 0 else dict(do_sample=False)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        eos_token_id=stop or None,
        pad_token_id=stop[0] if stop else None,
        return_dict_in_generate=True,
        prefill_chunk_size=PREFILL_TOKENS if ids.shape[1] > PREFILL_TOKENS else None,
        **sampling,
    )
    model.generation_config = settings  # else a folder's own defaults (a top_k, say) fill what is not set here
    cache, reason = _cache(model, path, ids.shape[1] + max_new_tokens, max_new_tokens if cuda_graphs else 0, latents)
    torch.manual_seed(seed)
    start = time.perf_counter()
    if cache is not None and ids.shape[1] > PREFILL_TOKENS and dist.is_initialized() and dist.get_world_size() > 1:
        _read_together(model, ids[:, :-1], cache)
        settings.prefill_chunk_size = None  # the last token alone is left
    result = model.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=streamer,
        **({} if cache is None else {"past_key_values": cache}),
    )  # fmt: skip
    first, last = streamer.times[1], streamer.times[-1]
    new = result.sequences[0, ids.shape[1] :]
    total, growing = _cache_bytes(result.past_key_values)
    return Generation(
        text=tokenizer.decode(new, **DECODE),
        prompt_tokens=ids.shape[1],
        new_tokens=len(new),
        prefill_seconds=first - start,
        tokens_per_second=(len(new) - 1) / (last - first) if len(new) > 1 else 1 / (first - start),
        cache_bytes=total,
        kv_bytes_per_token=growing // result.past_key_values.get_seq_length(),
        decoded_by="a CUDA graph" if _captured(cache) else f"single kernels ({reason})",
    )


def _read_together(model: HyloForCausalLM, ids: torch.Tensor, cache: HyloCache) -> None:
    """Read a prompt on all ranks; each of them has all of it in its cache afterwards."""
    ring = Ring(model.device)
    for _ in split_prefill(model, ids, cache, PREFILL_TOKENS, ring):
        pass
    ring.close()


def _captured(cache: HyloCache | None) -> bool:
    return cache is not None and cache.graph is not None and cache.graph.graph is not None


def _cache(model: Any, path: str | Path, tokens: int, new_tokens: int, latents: str | None) -> tuple[HyloCache | None, str]:
    """A hybrid's cache, of fixed size where its decode steps are to be captured, and why they are not.

    Raises:
        ConfigError: it would not fit in memory, or the model has no latents.
    """
    check_latents(model, path, latents)
    if not isinstance(model, HyloForCausalLM):
        return None, "a model of transformers"
    reason = not_captured(model, new_tokens)
    try:
        model.check_cache_fits(1, tokens, latents)
        cache = model.new_cache(1, None if reason else tokens, latents)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return cache, reason or unsupported(model, cache) or "it ended before"


def check_latents(model: Any, path: str | Path, latents: str | None) -> None:
    """Refuse 8-bit latents of a model that has none.

    Raises:
        ConfigError: it has none.
    """
    if latents is not None and not isinstance(model, HyloForCausalLM):
        raise ConfigError(f"{path} is a model of transformers, which has no latents to keep in {latents}; leave it out")
    if latents is not None and MLA_SYMBOL not in model.config.mixers:
        raise ConfigError(f"{path} has no MLA layers, so no latents to keep in {latents}; leave it out")


def not_captured(model: Any, new_tokens: int) -> str | None:
    """Say why decode steps are not captured as a CUDA graph, by what was asked for; `new_tokens` is 0 where it was not."""
    if model.device.type != "cuda":
        return "no GPU"
    if new_tokens < CAPTURED_TOKENS:
        return "few new tokens" if new_tokens else "cuda_graphs is false"
    return None


def open_for_generation(path: str | Path, weights: str | None) -> tuple[Any, Any]:
    """Open a model and its tokenizer; `weights` "fp8" keeps a hybrid's in FP8.

    Raises:
        ConfigError: nothing loadable at `path`, another format than FP8, or FP8 weights of another model than a hybrid.
    """
    if weights not in (None, "fp8"):
        raise ConfigError(f"weights {weights!r} is no format that weights are kept in; use 'fp8' or None")
    model, tokenizer = open_model(path)
    if weights is not None:
        if not isinstance(model, HyloForCausalLM):
            raise ConfigError(f"{path} is a model of transformers, whose weights are not kept in {weights} here; leave it out")
        keep_weights_in_fp8(model)
    return model, tokenizer


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a text: those of generation_config.json, or else the tokenizer's."""
    stop = model.generation_config.eos_token_id
    stop = tokenizer.eos_token_id if stop is None else stop
    return stop if isinstance(stop, list) else [] if stop is None else [stop]


def prompt_ids(model: Any, tokenizer: Any, path: str | Path, prompt: str, chat: bool) -> torch.Tensor:
    """Return a prompt's tokens, int64 [1, tokens] on the model's device.

    Raises:
        ConfigError: an empty prompt, tokens that the model does not have, no chat template or one that refuses the prompt.
    """
    ids = _tokenise(tokenizer, prompt, chat).to(model.device)
    if (largest := int(ids.max())) >= (rows := model.get_input_embeddings().num_embeddings):
        raise ConfigError(
            f"the prompt holds {tokenizer.convert_ids_to_tokens(largest)!r}, id {largest} of the tokenizer of {path}, whose "
            f"model has {rows} (0 to {rows - 1}); leave it out, or use the tokenizer that the model was made with"
        )
    return ids


def warn_of_length(model: Any, path: str | Path, tokens: int, new_tokens: int) -> None:
    """Warn where a prompt and its new tokens go past what the model was trained for; of a hybrid the model itself does."""
    if isinstance(model, HyloForCausalLM):
        model.warn_of_length(tokens, new_tokens)
        return
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and tokens + new_tokens > longest:
        logger.warning("%s", length_warning(str(path), longest, tokens, new_tokens))


def _tokenise(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    """int64 [1, tokens]."""
    if chat:
        if tokenizer.chat_template is None:
            raise ConfigError("this tokenizer has no chat template; give the prompt as plain text, without chat")
        turns = [{"role": "user", "content": prompt}]
        options = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
        try:
            return tokenizer.apply_chat_template(turns, **options).input_ids
        except TemplateError as error:
            raise ConfigError(f"the tokenizer's chat template cannot be used: {error}; give the prompt without chat") from error
    ids = tokenizer(prompt).input_ids
    if not ids:
        raise ConfigError("the prompt is empty; give at least one word")
    return torch.tensor([ids])


def _cache_bytes(cache: Any) -> tuple[int, int]:
    """(all bytes, bytes that grow with the sequence) of our cache or of transformers' own for a teacher."""
    if isinstance(cache, HyloCache):
        return cache.nbytes(), cache.token_nbytes()
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    return held, held
