"""The verbs of `hylo` around text, checkpoints and finished models."""

import contextlib
import os
import shutil
import sys
import time
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

import megatron_hylo
from megatron_hylo.cli.console import console, print_json, results, track
from megatron_hylo.cli.types import PositiveInt
from megatron_hylo.config import TeacherWindow
from megatron_hylo.config.teacher_window import OWN_WINDOW
from megatron_hylo.io.start_up import model_imports


def layouts(json: bool = False) -> None:
    """Show the named layouts: parameters and KV cache of each.

    Args:
        json: print an array of {name, params, kv_percent, kv_bytes_per_token} instead of a table.
    """
    from megatron_hylo.config.layouts import layout_rows

    rows = layout_rows()
    if json:
        print_json(rows)
        return
    table = Table(title="Named layouts (KV bytes a token in bf16)")
    table.add_column("layout", no_wrap=True)
    for name in ("parameters", "KV %", "KV bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(str(row["name"]), f"{row['params']:,}", f"{row['kv_percent']:.1f}", f"{row['kv_bytes_per_token']:,}")
    results.print(table)


def fetch(what: Literal["teacher", "documents", "library", "unseen", "qwen3-tokenizer"]) -> None:
    """Download a verified artefact into the cache and print where it is.

    Args:
        what: the SmolLM2-135M-Instruct teacher (GGUF), long text documents, these with more kinds of text (library), text of
            packages that are in no other set (unseen, for evaluation), or Qwen3's tokenizer.
    """
    from megatron_hylo.data import artefacts

    functions = {
        "teacher": artefacts.fetch_teacher,
        "documents": artefacts.fetch_documents,
        "library": artefacts.fetch_library,
        "unseen": artefacts.fetch_unseen,
        "qwen3-tokenizer": artefacts.fetch_qwen3_tokenizer,
    }
    print(functions[what]())


def scripts(folder: Path, layout: str | None = None) -> None:
    """Write the Slurm scripts and the recipes of all stages to a folder, for other layouts or where there is no checkout.

    Args:
        folder: to make; `sbatch FOLDER/slurm/stage1_ild.sh` then reads FOLDER/megatron_hylo/recipes.
        layout: a named layout (`hylo layouts`) whose recipes are written, at 2K, 8K, 32K, 64K and 128K; by default those of
            Llama-3.2-1B.
    """
    from megatron_hylo.config.recipes import recipe_files, stage_scripts
    from megatron_hylo.io import atomic_directory

    package = Path(megatron_hylo.__path__[0])
    recipes = None if layout is None else recipe_files(layout)  # refused before anything is made
    with atomic_directory(folder) as made:
        shutil.copytree(package / "slurm", made / "slurm")
        kept = made / "megatron_hylo" / "recipes"
        if layout is None or recipes is None:
            shutil.copytree(package / "recipes", kept)
        else:
            kept.mkdir(parents=True)
            for name, text in recipes.items():
                (kept / name).write_text(text)
            for name, text in stage_scripts(layout, package / "slurm").items():
                (made / "slurm" / name).write_text(text)
    console.print(f"wrote {folder}; set HYLO_PYTHON to the Python that this package is installed in")


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
    with model_imports():
        from megatron_hylo.data.preprocess import preprocess as preprocess_text

    made = preprocess_text(
        input, output, tokenizer, heldout_fraction, overwrite=overwrite, on_bad_text=on_bad_text,
        more_inputs=more_inputs or (), key=key, chat=chat, loss=loss, workers=workers, track=track,
    )  # fmt: skip
    console.print(f"wrote {output}")
    if json:
        print_json({name: value for name, value in asdict(made).items() if name != "heldout_names"})


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
    import torch

    from megatron_hylo.platform.distributed import is_main, session
    from megatron_hylo.serve.generate import check_prompt, generate_text

    if batch is not None:
        _generate_many(
            model, prompt, batch=batch, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
            repetition_penalty=repetition_penalty, seed=seed, chat=chat, latents=latents, weights=weights,
            cuda_graphs=cuda_graphs,
        )  # fmt: skip
        return
    begun = False

    def show(text: str) -> None:
        nonlocal begun
        if not begun:  # nothing is shown of a prompt that is refused
            results.print(prompt, style="dim", end="", highlight=False, markup=False, soft_wrap=True)
            begun = True
        results.print(text, end="", highlight=False, markup=False, soft_wrap=True)

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    with session() if several else contextlib.nullcontext():
        if prompt == "-":  # the ranks of a machine share its standard input
            said = [sys.stdin.buffer.read().decode("utf-8-sig", errors="surrogateescape") if is_main() else ""]
            if several:
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


def _generate_many(model: Path, lines: str, **settings: Any) -> None:
    """Continue the prompts of JSON Lines and print a line for each as it ends, with its number from 0."""
    from megatron_hylo.config import ConfigError
    from megatron_hylo.serve.generate_batch import generate_texts, read_prompts

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--batch decodes in one process; start it without torchrun, or leave --batch out")
    if lines == "-":
        lines = sys.stdin.buffer.read().decode("utf-8-sig", errors="surrogateescape")
    prompts, start = read_prompts(lines), time.perf_counter()

    def show(number: int, result: Any) -> None:
        print(dumps({"number": number} | prompts[number] | asdict(result)), flush=True)

    found = generate_texts(model, [one["prompt"] for one in prompts], on_result=show, **settings)
    tokens, seconds = sum(result.new_tokens for result in found), time.perf_counter() - start
    ways = [result.decoded_by for result in found]  # short texts may have ended before the capture
    console.print(
        f"{len(found):,} prompts, {tokens:,} new tokens in {seconds:.1f} s, with loading and reading the prompts; decoded by "
        f"{'a CUDA graph' if 'a CUDA graph' in ways else ways[-1]}",
        style="dim",
    )


def evaluate(
    model: Path,
    data: Path,
    teacher: Path | None = None,
    sequence_length: PositiveInt = 2048,
    windows: PositiveInt = 32,
    teacher_window: TeacherWindow = OWN_WINDOW,
) -> None:
    """Print held-out perplexity of a model as JSON and, with a teacher, KL to it and top-1 agreement.

    Args:
        model: model folder or training checkpoint.
        data: dataset folder made by `hylo preprocess`.
        teacher: model folder to compare with.
        sequence_length: tokens a window.
        windows: windows at most.
        teacher_window: how the teacher reads more tokens than its window has: --teacher_window.mode rope or windows.
    """
    with model_imports():
        from megatron_hylo.eval.folders import evaluate_folder
        from megatron_hylo.platform.distributed import session

    with session():
        quality = evaluate_folder(model, data, teacher, sequence_length, windows, track, teacher_window)
    print_json(quality.to_dict())
