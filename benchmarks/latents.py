"""Measure 8-bit latents in a hybrid: perplexity, KL to the model's own latents, and recall, on real text.

    python benchmarks/latents.py runs/quickstart/export runs/quickstart/data

Teacher-forced: all keys and values are made of what the cache holds. Recall: a passkey of five digits is told at a depth in
held-out text and asked for at the end; share of its tokens that are the most likely ones, and their mean log-probability.
Prints a table and, last, one JSON line; writes RESULTS.md.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from megatron.core.datasets.indexed_dataset import IndexedDataset
from report import device_name, report

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.convert.open_model import open_model
from megatron_hylo.hf import HyloCache

COLUMNS = ("latents", "bytes a token", "perplexity", "KL to the model's dtype", "passkey tokens right", "their log-probability")


@torch.no_grad()
def main(
    model: Path,
    data: Path,
    windows: int = 4,
    length: int = 1024,
    trials: int = 4,
    threads: int = 1,
    results: Path = Path("benchmarks/results/latents"),
    commit: str = "",
) -> None:
    """Measure each format on the same windows.

    Args:
        model: hybrid.
        data: dataset folder, whose held-out text is read.
        windows, length: of text, and tokens of each.
        trials: passkeys, at depths spread over a window.
        threads: of torch.
        results: path without suffix of the .md to write.
        commit: of the code, for the results file.
    """
    torch.set_num_threads(threads)
    hybrid, tokenizer = open_model(model)
    text = IndexedDataset(str(data / "heldout"))
    stream = torch.cat([torch.as_tensor(document).long() for document in text])[: (windows + trials) * length]
    prompts = [
        passkey_prompt(tokenizer, stream[(windows + i) * length :][: length - 64], (i + 0.5) / trials, i) for i in range(trials)
    ]
    own: list[torch.Tensor] = []
    rows: list[dict[str, Any]] = []
    for latents in (None, "int8", "fp8"):
        loss = kl = 0.0
        for i in range(windows):
            ids = stream[i * length : (i + 1) * length][None].to(hybrid.device)
            cache = HyloCache(latents=latents)
            log_p = hybrid(ids, past_key_values=cache).logits[0, :-1].float().log_softmax(-1)
            loss -= float(log_p.gather(1, ids[0, 1:, None]).mean()) / windows
            if latents is None:
                own.append(log_p.cpu())
            kl += float((own[i].exp() * (own[i] - log_p.cpu())).sum(-1).mean()) / windows
        right = log_probability = 0.0
        for ids, answer in prompts:
            asked = torch.cat([ids, answer])[None].to(hybrid.device)
            log_p = hybrid(asked, past_key_values=HyloCache(latents=latents), logits_to_keep=len(answer) + 1).logits[0, :-1]
            log_p = log_p.float().log_softmax(-1).cpu()
            right += float((log_p.argmax(-1) == answer).float().mean()) / trials
            log_probability += float(log_p.gather(1, answer[:, None]).mean()) / trials
        rows.append(dict(latents=latents, bytes_per_token=cache.token_nbytes() / length, perplexity=math.exp(loss), kl=kl,
                         passkey=right, passkey_log_probability=log_probability))  # fmt: skip
        print(rows[-1], flush=True)
    own_dtype = str(hybrid.dtype).removeprefix("torch.")
    cells = [(r["latents"] or own_dtype, f"{r['bytes_per_token']:,.0f}", f"{r['perplexity']:.3f}", f"{r['kl']:.2e}",
              f"{r['passkey']:.2f}", f"{r['passkey_log_probability']:.3f}") for r in rows]  # fmt: skip
    intro = [f"{windows} held-out windows of {length:,} tokens; {trials} passkeys."]
    report(results, "Latents in 8 bits", intro, COLUMNS, cells, f"{device_name()}, commit {commit or 'not given'}")
    print(json.dumps({"benchmark": "latents", "rows": rows}))


def passkey_prompt(tokenizer: Any, text: torch.Tensor, depth: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of a text that tells a passkey and asks for it, and those of the passkey."""
    key = str(random.Random(seed).randint(10_000, 99_999))
    told, asked = (
        torch.tensor(tokenizer(part, add_special_tokens=False).input_ids)
        for part in (
            f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n",
            "\nWhat is the pass key? The pass key is",
        )
    )
    answer = torch.tensor(tokenizer(f" {key}", add_special_tokens=False).input_ids)
    place = int(depth * len(text))
    return torch.cat([text[:place], told, text[place:], asked]), answer


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
