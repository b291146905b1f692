"""Serving with vLLM: a hybrid beside its dense base model, random weights, one engine after the other.

    python benchmarks/serve.py                                       # GPU: Llama-3.2-3B and 6 MLA + 22 Gated DeltaNet at 64K
    python benchmarks/serve.py smollm2-135m-8mla22gdn --length 256 --new 8 --most 2 --repeats 1      # CPU, minutes

Measures the time to the first token of one prompt, then as many prompts at once as the cache holds (at most --most): output
tokens a second with and without the time that reading the prompts takes. Prints the table and, last, one JSON line.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from jsonargparse import auto_cli

from megatron_hylo.cli.boundary import plain_errors


def write_folders(layout: str, length: int, folder: Path) -> list[Path]:
    """Write config.json of the dense base model and of the hybrid, without weights."""
    from megatron_hylo.config.layouts import get_layout
    from megatron_hylo.convert.hf_config import hf_config_from_model

    hybrid = get_layout(layout).config.replace(max_position_embeddings=length)
    dense = hybrid.replace(hybrid_layer_pattern="*-" * len(hybrid.mixers), mla_rotary_pairs=())
    for name, config in (("dense", dense), (layout, hybrid)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(hf_config_from_model(config, "bfloat16")))
    return [folder / "dense", folder / layout]


def measure(folder: Path, length: int, new: int, most: int, repeats: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Measure one model in this process: seconds, tokens a second, bytes of cache a request."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from vllm import LLM, SamplingParams
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    llm = LLM(
        model=str(folder), load_format="dummy", skip_tokenizer_init=True, max_model_len=length + new,
        enable_prefix_caching=False, max_num_seqs=most, **settings,
    )  # fmt: skip
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    generator = torch.Generator().manual_seed(0)

    def run(prompts: int, tokens: int) -> float:
        """Seconds of completing so many prompts by so many tokens each."""
        ids = torch.randint(0, vocabulary, (prompts, length), generator=generator).tolist()
        asked = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        llm.generate([{"prompt_token_ids": prompt} for prompt in ids], asked, use_tqdm=False)
        return time.perf_counter() - begin

    cache = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    held = get_max_concurrency_for_kv_cache_config(llm.llm_engine.vllm_config, cache)
    run(1, 2)  # kernels are compiled
    first = median(run(1, 1) for _ in range(repeats))
    requests = max(1, min(most, int(held)))
    read, whole = run(requests, 1), run(requests, new)
    size = sum(tensor.size for tensor in cache.kv_cache_tensors)
    return {
        "model": folder.name, "first_token_s": first, "held": held, "cache_mib": size / held / 2**20, "requests": requests,
        "output_tokens_s": requests * new / whole, "decode_tokens_s": requests * (new - 1) / (whole - read),
    }  # fmt: skip


def main(
    layout: str = "llama3.2-3b-6mla22gdn",
    length: int = 65_280,
    new: int = 256,
    most: int = 64,
    repeats: int = 3,
    settings: dict[str, Any] = {},  # noqa: B006  jsonargparse shows it
    results: Path = Path("benchmarks/results/serve"),
    only: Path | None = None,
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
    """
    if only is not None:
        print("MEASURED " + json.dumps(measure(only, length, new, most, repeats, settings)))
        return
    from report import device_name, report

    found = []
    with tempfile.TemporaryDirectory() as folder:
        for model in write_folders(layout, length + new, Path(folder)):
            command = [sys.executable, __file__, layout, "--only", str(model), "--settings", json.dumps(settings)]
            for name, value in (("length", length), ("new", new), ("most", most), ("repeats", repeats)):
                command += [f"--{name}", str(value)]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found.append(json.loads(output.split("MEASURED ")[1].splitlines()[0]))
    rows = [
        (r["model"], f"{r['first_token_s']:.2f}", f"{r['held']:.1f}", f"{r['cache_mib']:,.0f}", str(r["requests"]),
         f"{r['output_tokens_s']:,.1f}", f"{r['decode_tokens_s']:,.1f}")
        for r in found
    ]  # fmt: skip
    import vllm

    columns = ("model", "first token (s)", "requests the cache holds", "cache a request (MiB)", "requests at once",
               "output tokens/s", "while decoding")  # fmt: skip
    intro = [
        f"Prompts of {length:,} random tokens, answers of {new}, random weights, no cached prefixes; vLLM {vllm.__version__}."
    ]
    report(results, "Serving with vLLM", intro, columns, rows, f"{device_name()}, settings {settings or 'of vLLM'}")
    print(json.dumps({"benchmark": "serve", "device": device_name(), "length": length, "new": new, "rows": found}))


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
