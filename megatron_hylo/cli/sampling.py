"""`hylo sample-text`: a dataset of text that a model writes itself."""

from pathlib import Path
from typing import Literal

from megatron_hylo.cli.console import console, print_json, results, track
from megatron_hylo.cli.types import PositiveInt


def sample_text(
    teacher: Path,
    output: Path,
    *,
    tokens: PositiveInt,
    length: PositiveInt = 2048,
    temperature: float = 1.0,
    top_p: float = 0.95,
    chat_share: float = 0.0,
    starts: Path | None = None,
    starts_share: float | None = None,
    start_tokens: PositiveInt = 64,
    max_repetition: float = 0.5,
    heldout_fraction: float = 0.05,
    batch_size: PositiveInt | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Have a model write a dataset, for training on its own distribution: documents sampled in large batches.

    Makes a dataset folder as `hylo preprocess` does, to be `--data` or a part of `--text.blend` of hylo train. What repeats
    itself is left out and counted. The same command goes on at the shard where a killed one was.

    Args:
        teacher: model folder, training checkpoint, Hugging Face folder or .gguf file.
        output: dataset folder to make.
        tokens: to write, held-out ones included.
        length: tokens that a row of the batch writes, several documents end to end; none is longer.
        temperature: divides the logits; 0 takes the most likely token each time.
        top_p: sample from the most likely tokens that hold this much probability.
        chat_share: part of the documents that are chats, of a user's turn and an answer, by the tokenizer's template.
        starts: dataset folder of `hylo preprocess`; others begin with the first tokens of its training documents.
        starts_share: part of the documents that do; .5 where there are starts.
        start_tokens: how many tokens of them.
        max_repetition: documents are left out of which a larger part of the 8-grams came before in them.
        heldout_fraction: part of the documents that is held out.
        batch_size: rows of the batch; by default what the memory holds, 1,024 at most.
        precision: of weights and cache; bf16 on a GPU, fp32 on a CPU by default.
        seed: decides prompts and tokens.
        overwrite: replace what is there.
        json: print OUTPUT/sampled.json's figures of the text.
    """
    from megatron_hylo.cli.upcycle import chosen_dtype
    from megatron_hylo.serve.sample_text import sample_text as sample

    made, figures = sample(
        teacher, output, tokens, length, temperature, top_p, chat_share, starts, starts_share, start_tokens, max_repetition,
        heldout_fraction, batch_size, chosen_dtype(precision), seed, overwrite, track,
    )  # fmt: skip
    console.print(f"wrote {output}", soft_wrap=True)
    if json:
        print_json(figures.to_dict())
    else:
        results.print(f"{figures}; held out: {made.heldout_documents:,} documents", highlight=False, soft_wrap=True)
