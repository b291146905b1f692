"""`hylo <verb>`: one thin function a verb; cli_parser.py turns their signatures into options."""

import json
import sys
from pathlib import Path
from typing import Any, Callable, Literal

from rich.markup import escape
from rich.table import Table

from megatron_hylo.cli.console import console, set_up_logging, track
from megatron_hylo.cli.doctor import doctor
from megatron_hylo.cli.parser import build_parser, command
from megatron_hylo.cli.report import report
from megatron_hylo.cli.upcycle import assemble, cache_teacher, calibrate, select, serve_teacher, upcycle
from megatron_hylo.config import ConfigError, TeacherWindow
from megatron_hylo.config.paths import expand_home
from megatron_hylo.config.renamed import refuse_renamed
from megatron_hylo.config.teacher_window import OWN_WINDOW
from megatron_hylo.config.train import TrainConfig

EXIT_ERROR, EXIT_STOPPED = 2, 3


def layouts(json: bool = False) -> None:
    """Show the named layouts: parameters and KV cache of each.

    Args:
        json: print an array of {name, params, kv_percent, kv_bytes_per_token} instead of a table.
    """
    from megatron_hylo.config.layouts import layout_rows

    rows = layout_rows()
    if json:
        print(_json(rows))
        return
    table = Table(title="Named layouts (KV bytes a token in bf16)")
    table.add_column("layout", no_wrap=True)
    for name in ("parameters", "KV %", "KV bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["name"], f"{row['params']:,}", f"{row['kv_percent']:.1f}", f"{row['kv_bytes_per_token']:,}")
    console.print(table)


def fetch(what: Literal["teacher", "documents", "qwen3-tokenizer"]) -> None:
    """Download a verified artefact into the cache and print where it is.

    Args:
        what: the SmolLM2-135M-Instruct teacher (GGUF), long text documents, or Qwen3's tokenizer.
    """
    from megatron_hylo.data import artefacts

    functions = {
        "teacher": artefacts.fetch_teacher,
        "documents": artefacts.fetch_documents,
        "qwen3-tokenizer": artefacts.fetch_qwen3_tokenizer,
    }
    print(functions[what]())


def convert(
    source: Path, output: Path, to: Literal["megatron", "hf"] = "megatron", overwrite: bool = False, no_verify: bool = False
) -> None:
    """Convert a Hugging Face folder or GGUF file to a Megatron model folder, or back.

    No weight is rounded: FP8 and int8 ones are dequantised to float32. Ends with a comparison of all tensors and of fp32 logits
    with transformers' own loading, layer by layer above 1B parameters; a model that differs is not written.

    Args:
        source: Hugging Face folder (Llama, Qwen2.5, Qwen3 or an exported hybrid), .gguf file, or model folder.
        output: folder to make; it appears only when it is complete.
        to: the format to make.
        overwrite: replace what is there.
        no_verify: leave out the comparison.
    """
    from megatron_hylo.convert.to_hf import convert_megatron_to_hf
    from megatron_hylo.convert.to_megatron import convert_hf_to_megatron
    from megatron_hylo.platform.distributed import session

    with session():
        function = convert_hf_to_megatron if to == "megatron" else convert_megatron_to_hf
        function(source, output, overwrite, track, verify=not no_verify)
    console.print(f"wrote {output}")


def verify(hf_dir: Path, megatron_dir: Path, tokens: int = 128, tolerance: float = 1e-4) -> int:
    """Compare a Hugging Face checkpoint with its conversion: every tensor bit for bit, and the logits.

    Args:
        hf_dir: Hugging Face folder or .gguf file.
        megatron_dir: the model folder made from it.
        tokens: length of the random input that logits are compared on.
        tolerance: largest |delta logit| that passes, fp32; relative to the largest logit where that is above 1.
    """
    from megatron_hylo.convert.verify import verify_conversion
    from megatron_hylo.platform.distributed import session

    with session():
        result = verify_conversion(hf_dir, megatron_dir, tokens, tolerance, track=track)
    print("\n".join(result.lines()))
    print("verified" if result.ok else "NOT verified")
    return 0 if result.ok else 1


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
    overwrite: bool = False,
) -> None:
    """Tokenise text into a Megatron indexed dataset, with whole documents held out for evaluation.

    What cannot be used (lines that are not JSON or have no text, invalid bytes, binary files) is left out, said with its
    file and line, and counted in OUTPUT/data.json.

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
        overwrite: replace what is there.
    """
    from megatron_hylo.data.preprocess import preprocess as preprocess_text

    preprocess_text(
        input, output, tokenizer, heldout_fraction, overwrite=overwrite, on_bad_text=on_bad_text,
        more_inputs=more_inputs or (), key=key, chat=chat,
    )  # fmt: skip
    console.print(f"wrote {output}")


def export(model: Path, output: Path, overwrite: bool = False) -> None:
    """Export a model folder or checkpoint for Hugging Face: config, safetensors, tokenizer, modelling code.

    Args:
        model: model folder or training checkpoint.
        output: Hugging Face folder to make.
        overwrite: replace what is there.
    """
    convert(model, output, "hf", overwrite)


def generate(
    model: Path,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    chat: bool = False,
) -> None:
    """Continue a prompt with a carried cache: latents for MLA, states for linear layers.

    Args:
        model: model folder, training checkpoint, or exported Hugging Face folder.
        prompt: text to continue; - reads it from the standard input, in UTF-8.
        max_new_tokens: tokens to make at most.
        temperature: 0 takes the most likely token each time.
        top_p: with temperature > 0, sample from the most likely tokens that hold this much probability.
        repetition_penalty: > 1 makes tokens that are there already less likely; small models want about 1.2.
        seed: of the sampling.
        chat: wrap the prompt in the tokenizer's chat template.
    """
    from megatron_hylo.serve.generate import check_prompt, generate_text

    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode("utf-8-sig", errors="surrogateescape")
    check_prompt(prompt)
    console.print(prompt, style="dim", end="", highlight=False, markup=False)
    result = generate_text(
        model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        repetition_penalty=repetition_penalty, seed=seed, chat=chat,
        on_text=lambda text: console.print(text, end="", highlight=False, markup=False, soft_wrap=True),
    )  # fmt: skip
    console.print()
    console.print(
        f"{result.new_tokens} tokens, {result.tokens_per_second:.1f} tokens/s; cache {result.cache_bytes / 1e6:.2f} MB, "
        f"KV {result.kv_bytes_per_token} bytes/token",
        style="dim",
    )


def evaluate(
    model: Path,
    data: Path,
    teacher: Path | None = None,
    sequence_length: int = 2048,
    windows: int = 32,
    teacher_window: TeacherWindow = OWN_WINDOW,
) -> None:
    """Held-out perplexity of a model and, with a teacher, KL to it and top-1 agreement.

    Args:
        model: model folder or training checkpoint.
        data: dataset folder made by `hylo preprocess`.
        teacher: model folder to compare with.
        sequence_length: tokens a window.
        windows: windows at most.
        teacher_window: how the teacher reads more tokens than its window has: --teacher_window.mode rope or windows.
    """
    from megatron_hylo.eval.folders import evaluate_folder
    from megatron_hylo.platform.distributed import session

    with session():
        quality = evaluate_folder(model, data, teacher, sequence_length, windows, track, teacher_window)
    print(_json(quality.to_dict()))


def quickstart(
    linear: Literal["gdn", "mamba2"] = "gdn",
    init: Literal["calibrated", "paper"] = "calibrated",
    prompt: str | None = None,
    text: Path | None = None,
    output: Path | None = None,
    train_tokens: int | None = None,
) -> None:
    """Real teacher to evaluated hybrid in one go: fetch, convert, verify, calibrate, upcycle, train, export, generate.

    Args:
        linear: what three quarters of the layers become.
        init: how the hybrid starts: calibrated on data, or paper (HyLo's own, in its own shapes) for contrast.
        prompt: text to continue at the end; a default otherwise.
        text: folder or .jsonl of own training text instead of the Debian documentation packages.
        output: run folder, runs/quickstart by default (with _mamba2, _paper for those); the same command goes on where it was.
        train_tokens: tokens of stage 2; by default about six minutes' worth of the device.
    """
    from megatron_hylo.cli.quickstart import run_quickstart

    run_quickstart(linear, init, prompt, text, output, train_tokens, console, track=track)


def train(config: TrainConfig) -> int:
    """Train: pretrain (cross-entropy), align (stage 1, layer by layer) or distil (stages 2 and 3, KL to the teacher).

    Give a recipe by --config and override any key, e.g. --optimizer.lr 1e-4; under torchrun for several ranks.
    Started again, the same command resumes from the newest checkpoint. Ctrl-C or SIGUSR1 saves and stops (exit 3).
    """
    from megatron_hylo.platform.distributed import is_main
    from megatron_hylo.train.loop import Stopped
    from megatron_hylo.train.loop import train as run

    try:
        quality = run(config)
    except Stopped as stopped:
        if is_main():
            console.print(str(stopped))
        return EXIT_STOPPED
    if is_main():
        console.print(f"model: {config.output}/model" + (f", held-out perplexity {quality.perplexity:.2f}" if quality else ""))
    return 0


VERBS: tuple[Callable, ...] = (
    quickstart, layouts, fetch, convert, verify, preprocess, calibrate, upcycle, select, assemble, cache_teacher, serve_teacher,
    train, report, evaluate, export, generate, doctor,
)  # fmt: skip


def _json(value: Any) -> str:
    return json.dumps(value, indent=2)


def main(command_line: list[str] | None = None) -> None:
    """Entry point of `hylo`: exits 0 on success, 1 where a check failed, 2 on bad input, 3 when stopped by a signal."""
    from megatron_hylo.io import DamagedError, output_lock, plain_os_errors

    set_up_logging()
    parser = build_parser(VERBS)
    try:
        refuse_renamed(sys.argv[1:] if command_line is None else command_line)
        parsed = parser.parse_args(command_line)
    except ConfigError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(EXIT_ERROR)
    except UnicodeDecodeError as error:
        console.print(f"[bold red]error:[/] the recipe (--config) is not UTF-8: {error}; save it so", highlight=False)
        sys.exit(EXIT_ERROR)
    verb = {command(v): v for v in VERBS}[parsed.verb]
    values = parser.instantiate(parsed)[parsed.verb]
    try:
        if verb is train:
            config = TrainConfig(**{k: v for k, v in values.items() if k in TrainConfig.__dataclass_fields__})
            arguments, output = {"config": config}, config.output
        else:
            arguments = {k: expand_home(v) if isinstance(v, Path) else v for k, v in values.items() if k != "config"}
            output = arguments.get("output")
        with plain_os_errors(), output_lock(output):
            code = verb(**arguments)
    except (ConfigError, DamagedError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(EXIT_ERROR)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
