"""`hylo quickstart`: a real teacher becomes an evaluated hybrid, one resumable step after another.

    fetch -> convert -> verify -> tokenise -> upcycle -> align (stage 1) -> distil (stage 2) -> export -> generate

Every step leaves a finished folder or a line in results.json; started again, the command skips what is there and
training resumes from its newest checkpoint.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_hylo.config import ConfigError
from megatron_hylo.convert.to_hf import convert_megatron_to_hf
from megatron_hylo.convert.to_megatron import convert_hf_to_megatron
from megatron_hylo.convert.upcycle_folder import upcycle_folder
from megatron_hylo.convert.verify import verify_conversion
from megatron_hylo.data.artefacts import fetch_documents, fetch_teacher
from megatron_hylo.data.packed import heldout_windows
from megatron_hylo.data.preprocess import preprocess
from megatron_hylo.eval.perplexity import evaluate
from megatron_hylo.layouts import kv_bytes_per_token, kv_percent
from megatron_hylo.models.checkpoint import load_model, read_description
from megatron_hylo.platform.distributed import session
from megatron_hylo.quickstart_report import plot_quickstart
from megatron_hylo.sealed import is_sealed, write_json
from megatron_hylo.serve.generate import generate_text
from megatron_hylo.train.config import OptimizerSettings, TrainConfig
from megatron_hylo.train.loop import train

DEFAULT_PROMPT = "The Linux kernel is"
LAYOUT = {"gdn": "smollm2-135m-8mla22gdn", "mamba2": "smollm2-135m-8mla22m2"}


@dataclass(frozen=True)
class Budget:
    """How much a quickstart trains: on a CPU so much that all ends within 15 minutes."""

    sequence_length: int
    align_batch_size: int
    distil_batch_size: int
    micro_batch_size: int
    align_tokens: int
    distil_tokens: int
    eval_windows: int
    precision: str
    align_mixer_lr: float
    mixer_lr: float
    lr: float


CPU = Budget(
    sequence_length=256, align_batch_size=2, distil_batch_size=2, micro_batch_size=2, align_tokens=6_144,
    distil_tokens=18_432, eval_windows=8, precision="fp32", align_mixer_lr=2e-3, mixer_lr=1e-3, lr=5e-4,
)  # fmt: skip
GPU = Budget(
    sequence_length=2048, align_batch_size=4, distil_batch_size=16, micro_batch_size=4, align_tokens=655_360,
    distil_tokens=16_777_216, eval_windows=128, precision="bf16", align_mixer_lr=2e-3, mixer_lr=1e-3, lr=2e-4,
)  # fmt: skip


def run_quickstart(
    linear: str, prompt: str | None, text: str | None, output: Path, train_tokens: int | None, console: Console
) -> dict[str, Any]:
    """Run or resume the whole chain and write OUTPUT/summary.json and OUTPUT/quickstart.png.

    Args:
        linear: "gdn" or "mamba2".
        prompt: continued at the end.
        text: own training text, folder or .jsonl.
        output: run folder.
        train_tokens: tokens of stage 2, by default the device's budget.
        console: where to show progress.

    Returns:
        The content of summary.json.
    """
    start, budget = time.perf_counter(), GPU if torch.cuda.is_available() else CPU
    output.mkdir(parents=True, exist_ok=True)
    teacher, hybrid, data = output / "teacher", output / "hybrid", output / "data"
    step = _Steps(console, 8)

    step("teacher: SmolLM2-135M-Instruct (4-bit GGUF, dequantised), converted and verified against transformers")
    _prepare_teacher(teacher, output, console)
    step("text: whole documents held out")
    if not is_sealed(data):
        preprocess(text or str(fetch_documents()), str(data), str(teacher))
    step(f"upcycle: {LAYOUT[linear]}, the paper's initialisation")
    _upcycle(teacher, hybrid, linear)
    results = _evaluate_start(teacher, hybrid, data, output, budget)
    step("stage 1: align every layer with the teacher's (Enhanced ILD)")
    aligned = train(_stage("align", budget, hybrid, teacher, data, output, budget.align_tokens))
    step("stage 2: distil, KL to the teacher's full distribution")
    distil = _stage("distil", budget, output / "align" / "model", teacher, data, output, train_tokens or budget.distil_tokens)
    distilled = train(distil)
    step("export to a Hugging Face folder")
    if not is_sealed(output / "export"):
        with session():
            convert_megatron_to_hf(output / "distil" / "model", output / "export")
    step("generate with a carried cache")
    console.print(prompt or DEFAULT_PROMPT, style="dim", end="", highlight=False, markup=False)
    generated = generate_text(
        output / "export", prompt or DEFAULT_PROMPT, max_new_tokens=48, on_text=lambda s: console.print(s, end="", markup=False)
    )
    console.print(f"\n{generated.tokens_per_second:.1f} tokens/s, cache {generated.cache_bytes / 1e6:.2f} MB", style="dim")
    step("summary")
    config, base = (read_description(folder)[0] for folder in (hybrid, teacher))
    seconds = results.get("seconds", 0.0) + time.perf_counter() - start
    summary = {
        "teacher_ppl": results["teacher"]["perplexity"],
        "init_ppl": results["init"]["perplexity"],
        "aligned_ppl": aligned.perplexity,
        "distilled_ppl": distilled.perplexity,
        "init_kl": results["init"]["kl"],
        "aligned_kl": aligned.kl,
        "distilled_kl": distilled.kl,
        "distilled_agreement": distilled.agreement,
        "kv_percent": kv_percent(config),
        "kv_bytes_per_token": kv_bytes_per_token(config),
        "teacher_kv_bytes_per_token": kv_bytes_per_token(base),
        "train_tokens": sum(_trained_tokens(output / stage) for stage in ("align", "distil")),
        "heldout_tokens": distilled.tokens,
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "layout": LAYOUT[linear],
        "teacher": "SmolLM2-135M-Instruct, dequantised from 4 bits",
    }
    write_json(output / "summary.json", summary)
    _record(output, seconds=seconds)
    plot_quickstart(summary, output)
    _show(summary, console)
    console.print(f"\n{output}/summary.json, {output}/quickstart.png, model for transformers: {output}/export")
    return summary


class _Steps:
    """Numbered headings."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.done = console, total, 0

    def __call__(self, what: str) -> None:
        self.done += 1
        self.console.print(f"[bold cyan]{self.done}/{self.total}[/] {what}", highlight=False)


def _prepare_teacher(folder: Path, output: Path, console: Console) -> None:
    if not is_sealed(folder):
        with session():
            convert_hf_to_megatron(fetch_teacher(), folder)
    if "verified" in _results(output):
        return
    with session():
        result = verify_conversion(fetch_teacher(), folder)
    if not result.ok:
        raise ConfigError(f"{folder} is not what it was converted from: {result.differing[:3]}; remove it and run again")
    console.print(f"  {result.tensors} tensors equal, max |delta logit| {result.max_logit_difference:.1e}", highlight=False)
    _record(output, verified={"tensors": result.tensors, "max_logit_difference": result.max_logit_difference})


def _upcycle(teacher: Path, hybrid: Path, linear: str) -> None:
    if is_sealed(hybrid):
        found = read_description(hybrid)[0].mixers
        if ("M" in found) != (linear == "mamba2"):
            raise ConfigError(f"{hybrid} has other linear layers ({found}); give another --output for --linear {linear}")
        return
    with session():
        upcycle_folder(teacher, hybrid, LAYOUT[linear], None)


def _evaluate_start(teacher: Path, hybrid: Path, data: Path, output: Path, budget: Budget) -> dict[str, Any]:
    """Held-out quality of the teacher and of the hybrid before any training, kept in results.json."""
    if "init" not in _results(output):
        dtype = torch.bfloat16 if budget.precision == "bf16" else torch.float32
        with session():
            windows = heldout_windows(data / "heldout", budget.sequence_length, budget.eval_windows)
            reference = load_model(teacher, params_dtype=dtype)
            _record(output, teacher=evaluate(reference, windows, None, budget.micro_batch_size).to_dict())
            student = load_model(hybrid, params_dtype=dtype)
            _record(output, init=evaluate(student, windows, reference, budget.micro_batch_size).to_dict())
    return _results(output)


def _stage(stage: str, budget: Budget, model: Path, teacher: Path, data: Path, output: Path, tokens: int) -> TrainConfig:
    align = stage == "align"
    batch = budget.align_batch_size if align else budget.distil_batch_size
    return TrainConfig(
        stage=stage,
        data=str(data),
        output=str(output / stage),
        model=str(model),
        teacher=str(teacher),
        sequence_length=budget.sequence_length,
        global_batch_size=batch,
        micro_batch_size=budget.micro_batch_size,
        train_tokens=tokens,
        trainable="mixers" if align else "all",
        precision=budget.precision,
        optimizer=OptimizerSettings(
            lr=budget.lr,
            mixer_lr=budget.align_mixer_lr if align else budget.mixer_lr,
            warmup_ratio=0.05,
            min_lr_ratio=0.05,
        ),
        eval_windows=budget.eval_windows,
        save_interval=max(1, tokens // (batch * budget.sequence_length) // 2),
        log_interval=5,
        keep_checkpoints=1,
    )


def _results(output: Path) -> dict[str, Any]:
    file = output / "results.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _record(output: Path, **values: Any) -> None:
    write_json(output / "results.json", _results(output) | values)


def _trained_tokens(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return max(json.loads(line).get("tokens", 0) for line in lines)


def _show(summary: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{summary['layout']} on {summary['device']}: {summary['train_tokens']:,} training tokens")
    for name in ("", "held-out perplexity", "KL to teacher", "KV bytes/token (bf16)"):
        table.add_column(name, justify="left" if not name else "right")
    kv = f"{summary['kv_bytes_per_token']:,}"
    table.add_row("teacher", f"{summary['teacher_ppl']:,.2f}", "0", f"{summary['teacher_kv_bytes_per_token']:,}")
    for name, key in (("hybrid, initialised", "init"), ("after stage 1", "aligned"), ("after stage 2", "distilled")):
        table.add_row(name, f"{summary[key + '_ppl']:,.2f}", f"{summary[key + '_kl']:.3f}", kv)
    console.print(table)
