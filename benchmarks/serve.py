"""Serving with vLLM: a hybrid beside its dense base model, random weights, one engine after the other.

    python benchmarks/serve.py                                       # GPU: Llama-3.2-3B and 6 MLA + 22 Gated DeltaNet at 64K
    python benchmarks/serve.py --layout smollm2-135m-8mla22gdn --length 256 --new 8 --most 2 --repeats 1    # CPU, minutes

Measures the time to the first token of one prompt, then as many prompts at once as the cache holds (at most --most): output
tokens a second until all are answered, which is mostly the reading of prompts, and while all decode. Prints the table and,
last, one JSON line.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from jsonargparse import auto_cli

from megatron_hylo.cli.boundary import plain_errors


def write_folders(layout: str, length: int, folder: Path) -> list[Path]:
    """Write config.json of the hybrid and of its dense base model, without weights."""
    from megatron_hylo.config.layouts import get_layout
    from megatron_hylo.convert.hf_config import hf_config_from_model

    hybrid = get_layout(layout).config.replace(max_position_embeddings=length)
    dense = hybrid.replace(hybrid_layer_pattern="*-" * len(hybrid.mixers), mla_rotary_pairs=())
    for name, config in ((layout, hybrid), ("dense", dense)):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(hf_config_from_model(config, "bfloat16")))
    return [folder / layout, folder / "dense"]


def tokens_ahead(length: int, most: int) -> int:
    """Tokens that the first request may write while the others' prompts are read, in pieces of 8,192 tokens or more."""
    return most * (1 + -(-length // 8192))


def cache_of(worker: Any) -> tuple[int, float]:
    """Bytes of a worker's cache, and how many requests of the longest length it holds."""
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    cache = worker.model_runner.kv_cache_config
    held = get_max_concurrency_for_kv_cache_config(worker.vllm_config, cache)
    return sum(tensor.size for tensor in cache.kv_cache_tensors), held


def complete(llm: Any, prompts: list[list[int]], tokens: int, stop_at: int) -> Iterator[tuple[float, list[int]]]:
    """Complete prompts until each has `stop_at` of `tokens` tokens; yields seconds and tokens so far after each step."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    asked = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    engine, names = llm.llm_engine, [f"{time.monotonic_ns()}-{i}" for i in range(len(prompts))]
    begin, counts = time.perf_counter(), dict.fromkeys(names, 0)
    for name, prompt in zip(names, prompts):
        engine.add_request(name, {"prompt_token_ids": prompt}, asked)
    while min(counts.values()) < stop_at:
        for output in engine.step():
            counts[output.request_id] += len(output.outputs[0].token_ids)
        yield time.perf_counter() - begin, list(counts.values())
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()


def measure(folder: Path, length: int, new: int, most: int, repeats: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Measure one model: seconds, tokens a second, bytes of cache a request."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # cache_of goes to the workers
    import torch
    from vllm import LLM

    ahead = tokens_ahead(length, most)
    begin = time.perf_counter()
    llm = LLM(
        model=str(folder), load_format="dummy", skip_tokenizer_init=True, max_model_len=length + new + ahead,
        enable_prefix_caching=False, max_num_seqs=most, **settings,
    )  # fmt: skip
    started = time.perf_counter() - begin
    caches = llm.collective_rpc(cache_of)
    size, held = sum(size for size, _ in caches), min(held for _, held in caches)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    generator = torch.Generator().manual_seed(0)

    def prompts(count: int) -> list[list[int]]:
        return torch.randint(0, vocabulary, (count, length), generator=generator).tolist()

    first = [list(complete(llm, prompts(1), 1, 1))[-1][0] for _ in range(repeats + 1)][1:]  # once to compile kernels
    requests = max(1, min(most, int(held)))
    steps = list(complete(llm, prompts(requests), new + ahead, new))
    reading, before = next((seconds, counts) for seconds, counts in steps if min(counts))
    whole, after = steps[-1]
    if max(after) >= new + ahead:
        raise RuntimeError(f"the first of {requests} requests ended before the last one's prompt was read; lower --most")
    return {
        "model": folder.name, "start_s": started, "first_token_s": median(first), "held": held,
        "cache_mib": size / held / 2**20, "requests": requests, "reading_s": reading, "output_tokens_s": requests * new / whole,
        "decode_tokens_s": (sum(after) - sum(before)) / (whole - reading),
    }  # fmt: skip


def measure_apart(layout: str, folder: Path, options: dict[str, Any]) -> str:
    """Measure one model in a process of its own; what it printed."""
    command = [sys.executable, __file__, "--layout", layout, "--only", str(folder)]
    for name, value in options.items():
        command += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main(
    layout: str = "llama3.2-3b-6mla22gdn",
    length: int = 65_536,
    new: int = 256,
    most: int = 64,
    repeats: int = 3,
    settings: dict[str, Any] = {},  # noqa: B006  jsonargparse shows it
    results: Path = Path("benchmarks/results/serve"),
    only: Path | None = None,
    logs: list[Path] = [],  # noqa: B006
    where: str = "",
) -> None:
    """Measure both models, each in a process of its own.

    Args:
        layout: of the hybrid; the dense model is its base.
        length: tokens of a prompt.
        new: tokens of an answer.
        most: requests at once, at most.
        repeats: of the time to the first token, whose median is reported.
        settings: other arguments of vLLM's LLM, such as dtype.
        results: path without suffix of the .md to write.
        only: folder of one model to measure in this process, for a JSON line alone.
        logs: what earlier runs with --only printed, to report in place of measuring.
        where: device to name in the report; this machine's by default.
    """
    if only is not None:
        print("MEASURED " + json.dumps(measure(only, length, new, most, repeats, settings)), flush=True)
        return
    options = {"length": length, "new": new, "most": most, "repeats": repeats, "settings": settings}
    with tempfile.TemporaryDirectory() as folder:
        models = [] if logs else write_folders(layout, length + new + tokens_ahead(length, most), Path(folder))
        printed = [log.read_text() for log in logs] or [measure_apart(layout, model, options) for model in models]
    write_report(printed, options, results, where)


def write_report(printed: list[str], options: dict[str, Any], results: Path, where: str) -> None:
    """Write the table and print the JSON line of what runs with --only printed; the last one is the dense model's."""
    from report import device_name, report

    found = [json.loads(text.split("MEASURED ")[1].splitlines()[0]) for text in printed]
    dense = found[-1]
    rows = [
        (r["model"], f"{r['first_token_s']:.2f}", f"{r['cache_mib']:,.0f} ({r['cache_mib'] / dense['cache_mib']:.1%})",
         f"{r['held']:.0f}", str(r["requests"]), f"{r['reading_s']:.0f}", f"{r['output_tokens_s']:,.0f}",
         f"{r['decode_tokens_s']:,.0f} ({r['decode_tokens_s'] / dense['decode_tokens_s']:.2f} times)")
        for r in found
    ]  # fmt: skip
    columns = ("model", "first token (s)", "cache a request (MiB)", "requests the cache holds", "requests at once",
               "until all are read (s)", "output tokens/s, reading included", "output tokens/s while all decode")  # fmt: skip
    intro = [
        f"Prompts of {options['length']:,} random tokens, answers of {options['new']}, random weights, no cached prefixes. "
        "The time to the first token is that of one prompt alone. A request's cache includes states of fixed size."
    ]
    device = where or device_name()
    report(results, "Serving with vLLM", intro, columns, rows, f"{device}, settings {options['settings'] or 'of vLLM'}")
    print(json.dumps({"benchmark": "serve", "device": device, **options, "rows": found}))


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
