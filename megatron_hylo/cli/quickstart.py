"""`hylo quickstart`: a real teacher becomes an evaluated hybrid, one resumable step after another.

    fetch -> convert -> verify -> tokenise -> calibrate -> upcycle -> align (stage 1) -> distil (stage 2) -> export -> generate

Every step leaves a finished folder or a line in results.json; started again, the command skips what is there and
training resumes from its newest checkpoint.
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_hylo.calibrate.gather import calibrate
from megatron_hylo.cli.quickstart_budgets import BUDGETS, Budget, stage_config
from megatron_hylo.cli.quickstart_folders import LAYOUT, check_output, default_output, known_texts, read_results
from megatron_hylo.cli.quickstart_report import next_commands, plot_quickstart, quality_rows, write_report
from megatron_hylo.config import ConfigError
from megatron_hylo.config.layouts import get_layout, kv_bytes_per_token, kv_percent
from megatron_hylo.config.upcycle import UpcycleConfig
from megatron_hylo.convert.to_hf import convert_megatron_to_hf
from megatron_hylo.convert.to_megatron import convert_hf_to_megatron
from megatron_hylo.convert.verify import verify_conversion
from megatron_hylo.data.artefacts import fetch_documents, fetch_manuals, fetch_teacher
from megatron_hylo.data.debian import NotOffered
from megatron_hylo.data.heldout import heldout_windows
from megatron_hylo.data.manuals import MANUALS
from megatron_hylo.data.preprocess import preprocess
from megatron_hylo.eval.perplexity import evaluate
from megatron_hylo.eval.runs import read_records
from megatron_hylo.io import has_manifest, output_lock, write_json
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.models.checkpoint import load_model
from megatron_hylo.models.description import read_description
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.platform.distributed import session
from megatron_hylo.serve.generate import generate_text
from megatron_hylo.train.loop import train
from megatron_hylo.upcycle.run import upcycle_folder

DEFAULT_PROMPT = "The most important thing about free software is that"
ALIGN_LOSS = {
    "mse": "normalised error of its mixer's output",
    "ild": "Enhanced ILD",
    "sequential": "distance of the hidden states it makes",
}


def run_quickstart(
    linear: str,
    init: str,
    prompt: str | None,
    text: str | None,
    output: Path | None,
    train_tokens: int | None,
    console: Console,
    budget: Budget | None = None,
    track: Track = no_progress,
) -> dict[str, Any]:
    """Run or resume the whole chain and write OUTPUT/summary.json, OUTPUT/quickstart.png and OUTPUT/report.html.

    Args:
        linear: "gdn" or "mamba2".
        init: "calibrated", or "paper" for contrast.
        prompt: continued at the end.
        text: own training text, folder or .jsonl.
        output: run folder; by default one of its own for each kind of hybrid, see `default_output`.
        train_tokens: tokens of stage 2, by default the device's budget.
        console: where to show progress.
        budget: how much to calibrate and train, by default what suits the device.
        track: progress display over an iterable.

    Returns:
        The content of summary.json.
    """
    start = time.perf_counter()
    output = output or default_output(linear, init)
    with output_lock(output):
        return _run(linear, init, prompt or DEFAULT_PROMPT, text, output, train_tokens, console, budget, track, start)


def _run(
    linear: str,
    init: str,
    prompt: str,
    text: str | None,
    output: Path,
    train_tokens: int | None,
    console: Console,
    budget: Budget | None,
    track: Track,
    start: float,
) -> dict[str, Any]:
    budget = budget or BUDGETS["cuda" if torch.cuda.is_available() else "cpu", init]
    check_output(output, linear, init, text)
    fetched = _fetch_text(console) if text is None and not has_manifest(output / "data") else None
    output.mkdir(parents=True, exist_ok=True)
    teacher, hybrid, data = output / "teacher", output / "hybrid", output / "data"
    layout = LAYOUT[init, linear]
    step = _Steps(console, 9 if init == "calibrated" else 8)

    step("teacher: SmolLM2-135M-Instruct (4-bit GGUF, dequantised), converted and verified against transformers")
    _prepare_teacher(teacher, output, console)
    step("text: whole documents held out")
    _prepare_text(text, fetched, teacher, data, output)
    if init == "calibrated":
        step("calibrate: what the teacher's layers do on some of that text")
        _calibrate(teacher, data, output, budget, track)
    step(f"upcycle: {layout}, {'calibrated' if init == 'calibrated' else 'by the initialisation of the paper'}")
    _upcycle(teacher, hybrid, linear, init, output, budget, track)
    results = _evaluate_start(teacher, hybrid, linear, data, output, budget)
    step(f"stage 1: align every layer with the teacher's ({ALIGN_LOSS[budget.align_loss]})")
    aligned = train(stage_config("align", budget, hybrid, teacher, data, output, budget.align_tokens))
    step("stage 2: distil, KL to the teacher's full distribution")
    tokens = train_tokens or budget.distil_tokens
    distilled = train(stage_config("distil", budget, output / "align" / "model", teacher, data, output, tokens))
    step("export to a Hugging Face folder")
    if not has_manifest(output / "export"):
        with session():
            convert_megatron_to_hf(output / "distil" / "model", output / "export")
    step("generate with a carried cache")
    console.print(prompt, style="dim", end="", highlight=False, markup=False)
    generated = generate_text(
        output / "export", prompt, max_new_tokens=48, repetition_penalty=1.2,
        on_text=lambda s: console.print(s, end="", markup=False),
    )  # fmt: skip
    console.print(f"\n{generated.tokens_per_second:.1f} tokens/s, cache {generated.cache_bytes / 1e6:.2f} MB", style="dim")
    step("summary")
    config, base = (read_description(folder)[0] for folder in (hybrid, teacher))
    seconds = results.get("seconds", 0.0) + time.perf_counter() - start
    assert aligned is not None and distilled is not None, "this process is the main rank"
    summary = {
        "teacher_ppl": results["teacher"]["perplexity"],
        "init_ppl": results["init"]["perplexity"],
        "paper_init_ppl": results["paper_init"]["perplexity"],
        "aligned_ppl": aligned.perplexity,
        "distilled_ppl": distilled.perplexity,
        "init_kl": results["init"]["kl"],
        "paper_init_kl": results["paper_init"]["kl"],
        "aligned_kl": aligned.kl,
        "distilled_kl": distilled.kl,
        "distilled_agreement": distilled.agreement,
        "kv_percent": kv_percent(config),
        "kv_bytes_per_token": kv_bytes_per_token(config),
        "teacher_kv_bytes_per_token": kv_bytes_per_token(base),
        "paper_kv_bytes_per_token": kv_bytes_per_token(get_layout(LAYOUT["paper", linear]).config),
        "train_tokens": sum(_trained_tokens(output / stage) for stage in ("align", "distil")),
        "heldout_tokens": distilled.tokens,
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "init": init,
        "layout": layout,
        "teacher": "SmolLM2-135M-Instruct, dequantised from 4 bits",
        "text": results["text"],
        "generated": generated.text,
    }
    write_json(output / "summary.json", summary)
    _record(output, seconds=seconds)
    plot_quickstart(summary, output)
    program = _program()
    report = write_report(summary, prompt, output, program)
    _show(summary, console)
    console.print(f"\nReport: {report}   picture: {output}/quickstart.png   model for transformers: {output}/export")
    console.print("\nWhat to type next:")
    for why, line in next_commands(output, program):
        console.print(f"  {why}:\n    {line}", highlight=False, markup=False, soft_wrap=True)
    return summary


def _program() -> str:
    """How `hylo` is called in the user's shell: its bare name where PATH has it, else the path beside this Python."""
    beside = Path(sys.executable).parent / "hylo"
    return "hylo" if shutil.which("hylo") or not beside.is_file() else os.path.relpath(beside)


class _Steps:
    """Numbered headings."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.done = console, total, 0

    def __call__(self, what: str) -> None:
        self.done += 1
        self.console.print(f"[bold cyan]{self.done}/{self.total}[/] {what}", highlight=False)


def _prepare_teacher(folder: Path, output: Path, console: Console) -> None:
    if not has_manifest(folder):
        with session():
            convert_hf_to_megatron(fetch_teacher(), folder, verify=False)  # below, from what was written
    if "verified" in read_results(output):
        return
    with session():
        result = verify_conversion(fetch_teacher(), folder)
    if not result.ok:
        raise ConfigError(f"{folder} is not what it was converted from: {result.differing[:3]}; remove it and run again")
    console.print(f"  {result.tensors} tensors equal, max |delta logit| {result.max_logit_difference:.1e}", highlight=False)
    _record(output, verified={"tensors": result.tensors, "max_logit_difference": result.max_logit_difference})


def _fetch_text(console: Console) -> tuple[str, Path]:
    """Set and file of text: Debian's packages, which the published figures are of, or PyPI's manuals where apt has none."""
    try:
        return "documents", fetch_documents()
    except NotOffered as error:
        manuals = " and ".join(f"{name} {manual.version}" for name, manual in MANUALS.items())
        said = (
            f"The text is the manuals of {manuals} from PyPI, so figures will differ from the README's, whose text is packages "
            f"of Debian 12: {error.reason}."
        )
        console.print(said, style="yellow", highlight=False, markup=False, soft_wrap=True)
        return "manuals", fetch_manuals()


def _prepare_text(text: str | None, fetched: tuple[str, Path] | None, teacher: Path, data: Path, output: Path) -> None:
    """Tokenise given text, or a fetched set's, unless it was done."""
    if has_manifest(data):
        name = read_results(output).get("text") or known_texts(text)[0]
    else:
        name, file = fetched or (known_texts(text)[0], text)
        preprocess(str(file), str(data), str(teacher))
    _record(output, text=name)


def _calibrate(teacher: Path, data: Path, output: Path, budget: Budget, track: Track) -> None:
    if not has_manifest(output / "calibration"):
        with session():
            calibrate(
                teacher, data, output / "calibration", budget.calibration_tokens, budget.calibration_length,
                heldout=budget.eval_windows, track=track,
            )  # fmt: skip


def _upcycle(teacher: Path, hybrid: Path, linear: str, init: str, output: Path, budget: Budget, track: Track) -> None:
    if has_manifest(hybrid):
        return
    with session():
        calibration = str(output / "calibration") if init == "calibrated" else None
        settings = UpcycleConfig(
            str(teacher), str(hybrid), LAYOUT[init, linear], init=init, calibration=calibration, sequential=budget.sequential
        )
        upcycle_folder(settings, track)


def _evaluate_start(teacher: Path, hybrid: Path, linear: str, data: Path, output: Path, budget: Budget) -> dict[str, Any]:
    """Held-out quality of the teacher and of the hybrid before any training, kept in results.json.

    Beside a calibrated hybrid also that of the paper's initialisation, in its own shapes.
    """
    if "init" in read_results(output):
        return read_results(output)
    dtype = torch.bfloat16 if budget.precision == "bf16" else torch.float32
    with session():
        windows = heldout_windows(data / "heldout", budget.sequence_length, budget.eval_windows)
        reference = load_model(teacher, params_dtype=dtype)

        def quality(model: HyloModel, compared: HyloModel | None) -> dict[str, Any]:
            """Perplexity of a model on the held-out windows and, with one to compare, its KL, as JSON values."""
            return evaluate(model, windows, compared, budget.micro_batch_size).to_dict()

        found = {"teacher": quality(reference, None), "init": quality(load_model(hybrid, params_dtype=dtype), reference)}
        found["paper_init"] = found["init"]
        if read_description(hybrid)[1]["provenance"]["init"] != "paper":
            with tempfile.TemporaryDirectory() as scratch:
                upcycle_folder(UpcycleConfig(str(teacher), f"{scratch}/paper", LAYOUT["paper", linear], init="paper"))
                found["paper_init"] = quality(load_model(Path(scratch) / "paper", params_dtype=dtype), reference)
        _record(output, **found)
    return read_results(output)


def _record(output: Path, **values: Any) -> None:
    write_json(output / "results.json", read_results(output) | values)


def _trained_tokens(run: Path) -> int:
    return max(record.get("tokens", 0) for record in read_records(run))


def _show(summary: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{summary['layout']} on {summary['device']}: {summary['train_tokens']:,} training tokens")
    for name in ("", "held-out perplexity", "KL to teacher", "KV bytes/token (bf16)"):
        table.add_column(name, justify="left" if not name else "right")
    for row in quality_rows(summary):
        table.add_row(*row)
    console.print(table)
