"""How often a model writes recall exercises unasked: continuations of documents' beginnings that name things of exercises.

    python benchmarks/unasked.py '[MODEL, OTHER]' runs/result/unseen   # Hugging Face folders, GGUFs, or models of ours

Training text with recall exercises (docs/text.md, "Recall") can teach a model to write their facts and questions itself. The
first tokens of held-out documents are continued greedily. A continuation counts where two words for things, their qualities or
people of the exercises are in it that its beginning has not (data/recall_wording.py). Prints a table, examples and a JSON line.
"""

import json
import re
from pathlib import Path

import torch
from jsonargparse import auto_cli
from megatron.core.datasets.indexed_dataset import IndexedDataset
from report import device_name, markdown

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.convert.open_model import open_model
from megatron_hylo.data.recall_wording import PEOPLE, QUALITIES, THINGS

WORDS = frozenset(word.lower() for word in (*QUALITIES, *THINGS, *PEOPLE))


@torch.no_grad()
def main(
    models: list[Path],
    data: Path,
    beginnings: int = 64,
    given: int = 16,
    new_tokens: int = 48,
    device: str = "cpu",
    examples: int = 3,
) -> None:
    """Continue the same beginnings with each model.

    Args:
        models: of one tokenizer.
        data: dataset folder; its held-out documents are evenly taken.
        beginnings: how many documents.
        given: tokens of each.
        new_tokens: tokens that a model adds, greedily.
        device: of the models, as torch names it.
        examples: continuations of each model to print.
    """
    dataset = IndexedDataset(str(data / "heldout"))
    long = [index for index in range(len(dataset)) if dataset.sequence_lengths[index] >= given + new_tokens]
    if len(long) < beginnings:
        raise SystemExit(f"{len(long)} held-out documents have {given + new_tokens} tokens or more; take fewer --beginnings")
    chosen = [long[i * len(long) // beginnings] for i in range(beginnings)]
    ids = torch.stack([torch.as_tensor(dataset[index][:given]).long() for index in chosen]).to(device)
    found = []
    for path in models:
        model, tokenizer = open_model(path, torch.float32)
        out = model.to(device).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        pairs = [(tokenizer.decode(row[:given]), tokenizer.decode(row[given:])) for row in out]
        unasked = [new for old, new in pairs if len(words(new) - words(old)) > 1]
        print(
            f"{path}: {len(unasked)} of {beginnings}", *(f"    {text!r}" for text in unasked[:examples]), sep="\n", flush=True
        )
        found.append({"model": str(path), "continuations": beginnings, "unasked": len(unasked)})
    print(markdown(("model", "continuations", "name things of exercises"), [tuple(map(str, row.values())) for row in found]))
    print(
        json.dumps({"benchmark": "unasked", "device": device_name(), "given": given, "new_tokens": new_tokens, "rows": found})
    )


def words(text: str) -> set[str]:
    """Words of exercises that are in a text."""
    return WORDS & set(re.findall("[a-z]+", text.lower()))


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
