"""`hylo watch`: follows a training run by its files, from any machine that sees them."""

import time
from collections import deque
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_hylo.cli.boundary import EXIT_FAILURE, EXIT_STOPPED
from megatron_hylo.cli.console import results
from megatron_hylo.cli.runs import STATE_STYLES
from megatron_hylo.cli.types import PositiveFloat

if TYPE_CHECKING:
    from megatron_hylo.eval.runs import Run

BLOCKS = "▁▂▃▄▅▆▇█"
FIRST_LINES = 10  # of the log, before what is new
WIDTH = 60  # of bar and curves, in characters


def watch(run: Path, interval: PositiveFloat = 2.0) -> int:
    """Follow a training run until it ends: step, loss, learning rate, speed, memory, time left, evaluations, log lines.

    Reads the run folder's files, so it works on any machine that sees them, and writes nothing. Without a terminal it prints
    each line of RUN/log.txt once, from the last ten on. Exits 0 when the run has finished, 3 when it was stopped, 1 when it
    failed or was killed.

    Args:
        run: run folder of `hylo train`; of a folder with several, such as the quickstart's, the newest is followed.
        interval: seconds between two looks.
    """
    from megatron_hylo.config.paths import expand_home
    from megatron_hylo.eval.runs import read_run, run_folders, run_state

    folder = run_folders(expand_home(run))[-1]
    log = LogTail(folder / "log.txt")
    if results.is_terminal:
        lines: deque[str] = deque(maxlen=FIRST_LINES)
        with Live(console=results, refresh_per_second=4, transient=False) as live:
            while True:
                read = read_run(folder, str(folder))
                state, message = run_state(read)
                lines.extend(log.new_lines())
                live.update(panel(read, state, message, lines), refresh=True)
                if state != "running":
                    break
                time.sleep(interval)
    else:
        before = log.new_lines()
        print(*before[-FIRST_LINES:], sep="\n", flush=True) if before else None
        while True:
            state, message = run_state(read_run(folder, str(folder)))  # before the log, so that its last lines are printed
            for line in log.new_lines():
                print(line, flush=True)
            if state != "running":
                break
            time.sleep(interval)
        said = message if message.startswith(state) else f"{state}: {message}" if message else state
        print(f"{folder}: {said}", flush=True)
    return {"finished": 0, "stopped": EXIT_STOPPED}.get(state, EXIT_FAILURE)


class LogTail:
    """Reads a growing text file from where it was read before; only whole lines, each once.

    The file is opened anew each time, since a network file system shows other machines' writes to those who open a file.

    Args:
        file: need not exist yet.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.offset = file, 0

    def new_lines(self) -> list[str]:
        """Return the whole lines since the last call, without their line ends."""
        try:
            with open(self.file, "rb") as file:
                if file.seek(0, 2) < self.offset:  # made anew
                    self.offset = 0
                file.seek(self.offset)
                whole = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return []
        self.offset += len(whole) + 1 if whole else 0
        return whole.decode(errors="replace").splitlines() if whole else []


def panel(run: "Run", state: str, message: str, lines: "deque[str] | list[str]") -> Group:
    """The view of a run on a terminal.

    Args:
        run: as `eval.runs.read_run` gives it.
        state, message: of `eval.runs.run_state`.
        lines: newest lines of its log.
    """
    from megatron_hylo.eval.runs import last_written, seconds_of

    begun = time.localtime(seconds_of(run.starts[-1]["time"])) if run.starts else None
    started = time.strftime("%Y-%m-%d %H:%M:%S", begun) if begun else "an unknown time"
    host = run.environment.get("devices", ["?"])[0].split(":")[0]
    head = Text.assemble(
        (str(run.folder), "bold"), f"  {run.config.get('stage', '')}  ", (state, STATE_STYLES[state]),
        (f"  start {len(run.starts)} on {host} at {started}", "dim"),
    )  # fmt: skip
    left = run.seconds_left() if state == "running" else None
    share = run.step / run.total_steps if run.total_steps else 0.0
    progress = Table.grid(padding=(0, 2))
    progress.add_row(
        f"step {run.step:,} of {run.total_steps:,}",
        ProgressBar(total=1.0, completed=share, width=WIDTH // 2),
        f"{share:.0%}",
        f"{timedelta(seconds=round(left))} left" if left is not None else "",
    )
    shown: list[Any] = [head, progress, Text(_numbers(run, time.time() - last_written(run.folder), state))]
    shown += [curve for curve in (_curve(run, "loss", "loss"), _curve(run, "heldout_perplexity", "held-out ppl")) if curve]
    if message:
        shown.append(Text(message, style=STATE_STYLES[state]))
    shown += [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in lines]
    return Group(*shown)


def _numbers(run: "Run", age: float, state: str) -> str:
    from megatron_hylo.eval.runs import learning_rates

    newest: dict[str, Any] = next((r for r in reversed(run.records) if "tokens_per_second" in r), {})
    parts = [
        f"loss {newest['loss']:.4f}" if newest.get("loss") is not None else "",
        learning_rates(newest),
        f"{newest['tokens_per_second']:,.0f} tokens/s" if newest else "no step recorded yet",
        f"MFU {100 * newest['mfu']:.1f} %" if newest.get("mfu") is not None else "",
        f"peak memory {newest['peak_memory_gib']:.1f} GiB" if newest.get("peak_memory_gib") is not None else "",
        f"last word {timedelta(seconds=round(age))} ago" if state == "running" else "",
    ]
    return "   ".join(part for part in parts if part)


def _curve(run: "Run", metric: str, title: str) -> Text | None:
    values = [value for _, value in run.points(metric)]
    if not values:
        return None
    ends = f"{values[0]:,.4g} -> {values[-1]:,.4g}" if len(values) > 1 else f"{values[0]:,.4g}"
    return Text.assemble((f"{title:12} ", "dim"), (sparkline(values, WIDTH), "cyan"), f"  {ends}")


def sparkline(values: list[float], width: int) -> str:
    """Bars of eight heights for a series, from its least to its largest value.

    Args:
        values: finite; more than `width` of them are averaged in groups of about the same size.
        width: characters at most.
    """
    columns = min(width, len(values))
    edges = [index * len(values) // columns for index in range(columns + 1)]
    means = [sum(values[low:high]) / (high - low) for low, high in zip(edges, edges[1:])]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)
