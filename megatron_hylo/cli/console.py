"""Output of `hylo`: results on stdout; notes, progress and errors on stderr; which messages of which package."""

import io
import json
import logging
import math
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

import rich
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from megatron_hylo.io import is_launched_first
from megatron_hylo.io.progress import show_progress as track  # noqa: F401  of every verb

if TYPE_CHECKING:
    from megatron_hylo.upcycle.run import UpcycleReport
    from megatron_hylo.upcycle.select import Selection

TIME_FORMAT = "%Y-%m-%d %H:%M:%S"  # also of a run's own lines
FILE_WIDTH = 128  # a table in a job's log is not cut to the 80 columns that a file seems to have


def _width(stream: Any) -> int | None:
    return None if stream.isatty() else FILE_WIDTH


rich.reconfigure(stderr=True, width=_width(sys.stderr))  # also for the progress bars that name no console
console = rich.get_console()
results = Console(width=_width(sys.stdout))


def print_json(value: Any) -> None:
    """Print a result for programs to stdout; what is not finite is null, for NaN is no JSON."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False, ensure_ascii=False, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def set_up_logging(verbose: bool = False) -> None:
    """Show our own messages of the main rank; of other packages only errors, and no progress bars of theirs.

    Args:
        verbose: show also details, such as which kernel was chosen why.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a model's text on a terminal that has not all characters
    handler = RichHandler(console=console, show_path=False, log_time_format=TIME_FORMAT, omit_repeated_times=False)
    logging.basicConfig(level=logging.ERROR, format="%(message)s", handlers=[handler])
    level = logging.DEBUG if verbose else logging.INFO
    logging.getLogger("megatron_hylo").setLevel(level if is_launched_first() else logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)\b.*")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when it is imported; lm-eval has a bar for each task


def show_upcycle(report: "UpcycleReport") -> None:
    """Print the error of each layer, and the whole model's quality before training beside its cache."""
    from megatron_hylo.config.layouts import kv_bytes_per_token, kv_percent

    if report.errors is not None:
        table = Table(title="squared error of mixer outputs / energy of the teacher's, and of hidden states; other text")
        for name in ("layer", "mixer", "initialised", "W_O solved", "hidden state after it"):
            table.add_column(name, justify="right")
        for error in report.errors:
            table.add_row(str(error.layer), error.symbol, f"{error.initial:.3f}", f"{error.solved:.3f}", f"{error.hidden:.3f}")
        results.print(table)
    kv = f"KV {kv_percent(report.config):.1f}% ({kv_bytes_per_token(report.config):,} bytes a token)"
    if report.quality is None:
        results.print(f"{kv}; quality not measured: give --calibration")
        return
    q, t = report.quality, report.teacher_quality
    assert t is not None and q.kl is not None and q.agreement is not None, "both are measured together"
    results.print(
        f"before training: perplexity {q.perplexity:,.2f} (teacher {t.perplexity:,.2f}), KL {q.kl:.3f}, "
        f"top-1 agreement {100 * q.agreement:.1f}%, {kv}"
    )


def show_selection(found: "Selection") -> None:
    """Show the losses of hybrids by layer, and of the chosen one, on stderr: stdout is for the pattern."""
    if found.kl_by_layer is not None:
        table = Table(title=f"hybrids with one layer {'linear' if found.method == 'backward' else 'MLA'}, nats a token")
        ratios = found.recall_per_kl()
        for name in ("layer", "KL", *(["answers", "answers / KL"] if ratios else []), "chosen"):
            table.add_column(name, justify="right")
        for layer, kl in enumerate(found.kl_by_layer):
            cells = [str(layer), f"{kl:.4f}"]
            if ratios and found.answers_by_layer:
                ratio = ratios[layer]
                cells += [f"{found.answers_by_layer[layer]:.4f}", "" if ratio is None else f"{ratio:.2f}"]
            table.add_row(*cells, "MLA" if layer in found.mla_layers else "")
        console.print(table)
    console.print(f"KL to the teacher: {found.kl_all_linear:.4f} all linear, {found.kl_selected:.4f} as chosen")
    if found.answers_selected is not None:
        console.print(
            f"loss at {found.answer_tokens:,} tokens of recall answers: {found.answers_teacher:.4f} teacher, "
            f"{found.answers_all_linear:.4f} all linear, {found.answers_selected:.4f} as chosen"
        )
