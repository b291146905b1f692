"""What `hylo` shows: one console, progress bars on it, and which messages of whom."""

import io
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from megatron_hylo.io.progress import show_progress as track  # noqa: F401  of every verb

if TYPE_CHECKING:
    from megatron_hylo.upcycle.run import UpcycleReport

# a table in a job's log is not cut to the 80 columns that a file seems to have
console = Console(width=None if sys.stdout.isatty() else 128)


def set_up_logging() -> None:
    """Our own messages on the main rank; of other packages only errors, and no progress bars of theirs."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a model's text on a terminal that has not all characters
    logging.basicConfig(level=logging.ERROR, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)])
    logging.getLogger("megatron_hylo").setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)\b.*")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def show_upcycle(report: "UpcycleReport") -> None:
    """Error of each layer, and the whole model's quality before training beside its cache."""
    from megatron_hylo.config.layouts import kv_bytes_per_token, kv_percent

    if report.errors is not None:
        table = Table(title="squared error of mixer outputs / energy of the teacher's, and of hidden states; other text")
        for name in ("layer", "mixer", "initialised", "W_O solved", "hidden state after it"):
            table.add_column(name, justify="right")
        for error in report.errors:
            table.add_row(str(error.layer), error.symbol, f"{error.initial:.3f}", f"{error.solved:.3f}", f"{error.hidden:.3f}")
        console.print(table)
    kv = f"KV {kv_percent(report.config):.1f}% ({kv_bytes_per_token(report.config):,} bytes a token)"
    if report.quality is None:
        console.print(f"{kv}; quality not measured: give --calibration")
        return
    q, t = report.quality, report.teacher_quality
    console.print(
        f"before training: perplexity {q.perplexity:,.2f} (teacher {t.perplexity:,.2f}), KL {q.kl:.3f}, "
        f"top-1 agreement {100 * q.agreement:.1f}%, {kv}"
    )
