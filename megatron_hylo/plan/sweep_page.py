"""Page of a sweep's results in Markdown: fits, all cells and stages, and one table for each measure that has lengths."""

import re
import shlex
from collections.abc import Sequence
from typing import Any

from megatron_hylo.plan.sweep import Cell, Sweep
from megatron_hylo.plan.sweep_rows import ERROR

LOSSES = ("heldout_kl", "heldout_cross_entropy")
Rows = Sequence[tuple[Cell, dict[str, Any]]]


def page(sweep: Sweep, rows: Rows, fits: Sequence[dict[str, Any]], fitted: Sequence[int], pictured: bool) -> str:
    """Return the text of report.md.

    Args:
        sweep: its cells.
        rows: each cell's rows, as `sweep_rows.rows_of` returns them.
        fits: as `sweep_report.fit_metric` returns them.
        fitted: numbers of the cells that they are of.
        pictured: whether there is a picture of all cells, cells.png.
    """
    own = [fit["metric"] for fit in fits] or [name for name in LOSSES if any(name in row for _, row in rows)]
    measured = [name for name in _measured(rows) if "/heldout/" in name]  # perplexity of windows, beside the metrics of runs
    metrics = list(dict.fromkeys([*own, *measured]))
    lines = [f"# Sweep {sweep.file.stem}", "", *(f"- {fit['sentence']}" for fit in fits), ""]
    if fits:
        lines += ["![fits](report.png)", ""]
        shaded = "Shaded: 95 % of the bootstrap over cells, which says nothing of other seeds of one cell."
        if pictured:  # other cells are finished too
            numbers = ", ".join(map(str, fitted))
            shaded = f"Fitted: cells {numbers}, which differ in tokens, seed and number of MLA layers alone. {shaded}"
        lines += [shaded, ""]
    else:
        lines += ["No fit: too few finished cells, or tokens and cache bytes vary together in all of them.", ""]
    if pictured:
        dashed = "Dashed: in each panel the first cell that has the figure. Bars: one standard error."
        lines += ["![cells](cells.png)", "", dashed, ""]
    varied, staged = varied_names(sweep), any(row["stage"] for _, row in rows)
    columns = ["cell", *varied, *(["stage"] if staged else []), "state", "starts", "tokens", "cache bytes a token"]
    found = []
    for cell, row in rows:
        figures = [_figure(row.get(name)) for name in ("tokens", "kv_bytes_per_token", *metrics)]
        found.append([*_who(cell, row, varied, staged), row["state"], str(row["attempts"]), *figures,
                      f"{row['seconds'] / 60:.1f}"])  # fmt: skip
    lines += _table([*columns, *map(_title, metrics), "minutes of training"], found)
    for title, names in _by_length(rows).items():
        lines += ["", f"## {title}", "", *_lengths(rows, names, varied, staged)]
    if exports := _exports(sweep):
        lines += ["", "## Export", "", "Model cards take the evaluations above.", "", "```sh", *exports, "```"]
    failed = {row["cell"]: row["message"] for _, row in rows if row["message"]}
    lines += ["", *(f"- cell {number}: {message}" for number, message in failed.items())] if failed else []
    return "\n".join(lines) + "\n"


def _title(metric: str) -> str:
    """Heading of a metric: "perplexity, unseen (windows of 2,048)" of unseen/ppl/heldout/perplexity/2048."""
    evaluation, *_, name, length = metric.split("/") if "/heldout/" in metric else (metric, "", "")
    return f"{name}, {evaluation} (windows of {int(length):,})" if length else metric


def _exports(sweep: Sweep) -> list[str]:
    """Commands that export the finished hybrids of several stages."""
    chains = [c for c in sweep.cells if c.last.name and c.last.train is not None and c.state()[0] == "finished"]
    words = [re.sub(r"[^a-z0-9]+", "_", str(cell.varied.get("label", "")).lower()).strip("_") for cell in chains]
    folders = [sweep.output / "exports" / "-".join(filter(None, (name, c.last.folder.name))) for c, name in zip(chains, words)]
    return [f"hylo export {shlex.quote(str(c.last.model))} {shlex.quote(str(folder))}" for c, folder in zip(chains, folders)]


def varied_names(sweep: Sweep) -> list[str]:
    """Names of what tells the cells apart; their labels alone where all have one."""
    if all("label" in cell.varied for cell in sweep.cells):
        return ["label"]
    return list(dict.fromkeys(name for cell in sweep.cells for name in cell.varied))


def _who(cell: Cell, row: dict[str, Any], varied: Sequence[str], staged: bool) -> list[str]:
    return [str(cell.number), *(str(cell.varied.get(name, "")) for name in varied), *([row["stage"]] if staged else [])]


def _measured(rows: Rows) -> list[str]:
    """Names of all scores of evaluations: EVALUATION/SUITE/TASK/METRIC[/LENGTH]."""
    known = dict.fromkeys(name for _, row in rows for name in row)
    return [name for name in known if name + ERROR in known]


def _by_length(rows: Rows) -> dict[str, list[str]]:
    """Scores that have several lengths: title -> names, the shortest length first."""
    found: dict[str, list[str]] = {}
    for name in _measured(rows):
        evaluation, suite, task, metric, *length = name.split("/")
        if length and task != "heldout":
            found.setdefault(f"{evaluation}: {suite}, {task}, {metric}", []).append(name)
    return {title: sorted(names, key=lambda name: int(name.rsplit("/", 1)[1])) for title, names in found.items()}


def _lengths(rows: Rows, names: Sequence[str], varied: Sequence[str], staged: bool) -> list[str]:
    head = ["cell", *varied, *(["stage"] if staged else []), "tokens", *(f"{int(n.rsplit('/', 1)[1]):,}" for n in names)]
    return _table(head, [
        [*_who(cell, row, varied, staged), _figure(row.get("tokens")), *(_score(row, name) for name in names)]
        for cell, row in rows if any(name in row for name in names)
    ])  # fmt: skip


def _score(row: dict[str, Any], name: str) -> str:
    if (value := row.get(name)) is None:
        return ""
    error, digits = row.get(name + ERROR), 3 if abs(value) < 10 else 2
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _figure(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows)]
