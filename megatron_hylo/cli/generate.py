"""`hylo generate`: continue a prompt, or many prompts together."""

import contextlib
import sys
import time
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Any, Literal

from megatron_hylo.cli.console import console, print_json, results
from megatron_hylo.cli.types import PositiveInt
from megatron_hylo.config import ConfigError
from megatron_hylo.convert.source_path import check_model
from megatron_hylo.io import launched_ranks
from megatron_hylo.serve.requests import check_prompt, check_settings, read_prompts


def generate(
    model: Path,
    prompt: str,
    max_new_tokens: PositiveInt = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    latents: Literal["int8", "fp8"] | None = None,
    weights: Literal["fp8"] | None = None,
    cuda_graphs: bool = True,
    batch: PositiveInt | None = None,
    json: bool = False,
) -> None:
    """Continue a prompt with a carried cache: latents for MLA, states for linear layers.

    Under torchrun, a GPU a rank, a hybrid's prompt of more than 8,192 tokens is read by all ranks together.

    Args:
        model: model folder, training checkpoint, or exported Hugging Face folder.
        prompt: text to continue; - reads it from the standard input, in UTF-8. With --batch, many of them.
        max_new_tokens: tokens to make at most.
        temperature: 0 takes the most likely token each time.
        top_p: with temperature > 0, sample from the most likely tokens that hold this much probability.
        repetition_penalty: > 1 makes tokens that are there already less likely; small models want about 1.2.
        seed: of the sampling.
        chat: wrap the prompt in the tokenizer's chat template.
        latents: keep MLA's latents in 8 bits, half of bf16's memory.
        weights: keep a hybrid's linear maps in FP8, half of bf16's memory; faster on a GPU for one sequence.
        cuda_graphs: on a GPU capture the decode step as one CUDA graph, from 32 new tokens on.
        batch: decode up to so many prompts of a hybrid together, of any lengths: PROMPT is JSON Lines then, a string or an
            object with "prompt" a line, and a JSON line is printed for each as it ends, with its number from 0.
        json: print text, tokens, speed and cache as JSON instead.
    """
    check_model(model)
    check_settings(max_new_tokens, temperature, top_p, repetition_penalty)
    several = launched_ranks() > 1
    if batch is not None and several:
        raise ConfigError("--batch decodes in one process; start it without torchrun, or leave --batch out")
    shared = several and prompt == "-"  # the ranks of a machine share its standard input, which one of them reads
    if prompt == "-" and not shared:
        prompt = _standard_input()
    prompts = [] if batch is None else read_prompts(prompt)
    if batch is None and not shared:
        check_prompt(prompt)
    import torch

    from megatron_hylo.platform.distributed import is_main, session
    from megatron_hylo.serve.generate import generate_text

    if batch is not None:
        _generate_many(
            model, prompts, batch=batch, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
            repetition_penalty=repetition_penalty, seed=seed, chat=chat, latents=latents, weights=weights,
            cuda_graphs=cuda_graphs,
        )  # fmt: skip
        return
    begun = False

    def show(text: str) -> None:
        """Print a piece of the answer, before the first one the prompt."""
        nonlocal begun
        if not begun:  # nothing is shown of a prompt that is refused
            results.print(prompt, style="dim", end="", highlight=False, markup=False, soft_wrap=True)
            begun = True
        results.print(text, end="", highlight=False, markup=False, soft_wrap=True)

    with session() if several else contextlib.nullcontext():
        if shared:
            said = [_standard_input() if is_main() else ""]
            torch.distributed.broadcast_object_list(said)
            prompt = said[0]
            check_prompt(prompt)
        result = generate_text(
            model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
            repetition_penalty=repetition_penalty, seed=seed, chat=chat, latents=latents, weights=weights,
            cuda_graphs=cuda_graphs,
            **({} if json or not is_main() else {"on_text": show}),
        )  # fmt: skip
    if not is_main():
        return
    if json:
        print_json({"prompt": prompt} | asdict(result))
        return
    results.print()
    console.print(
        f"{result.new_tokens} tokens, {result.tokens_per_second:.1f} tokens/s; cache {result.cache_bytes / 1e6:.2f} MB, "
        f"KV {result.kv_bytes_per_token} bytes/token; decoded by {result.decoded_by}",
        style="dim",
    )


def _generate_many(model: Path, prompts: list[dict[str, Any]], **settings: Any) -> None:
    """Continue prompts of JSON Lines and print a line for each as it ends, with its number from 0."""
    from megatron_hylo.serve.generate_batch import generate_texts

    start = time.perf_counter()

    def show(number: int, result: Any) -> None:
        """Print one prompt's result as a JSON line, with the prompt's fields and number."""
        print(dumps({"number": number} | prompts[number] | asdict(result)), flush=True)

    found = generate_texts(model, [one["prompt"] for one in prompts], on_result=show, **settings)
    tokens, seconds = sum(result.new_tokens for result in found), time.perf_counter() - start
    ways = [result.decoded_by for result in found]  # short texts may have ended before the capture
    console.print(
        f"{len(found):,} prompts, {tokens:,} new tokens in {seconds:.1f} s, with loading and reading the prompts; decoded by "
        f"{'a CUDA graph' if 'a CUDA graph' in ways else ways[-1]}",
        style="dim",
    )


def _standard_input() -> str:
    """All of the standard input; bytes that are not UTF-8 stay as surrogates, which the check of prompts names."""
    return sys.stdin.buffer.read().decode("utf-8-sig", errors="surrogateescape")
