"""`hylo runs`: a table of training runs, and a comparison of named ones."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from megatron_hylo.cli.console import print_json, results

STATE_STYLES = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "red", "killed": "red"}
LEAST_IMPORTANT = ("commit", "teacher", "model", "tokens", "host", "started", "job", "stage")  # left out first without room


def runs(folders: tuple[Path, ...] = (), json: bool = False) -> None:
    """List training runs: stage, state, step, last loss, held-out quality, when and where; compare runs that are named.

    With two or more run folders, the settings that differ and the last figures are shown side by side.

    Args:
        folders: run folders, or folders with runs up to four folders below; by default the working directory.
        json: print an array of runs, or {runs, settings} of a comparison, instead of tables.
    """
    from megatron_hylo.config.paths import expand_home, short_names
    from megatron_hylo.eval.runs import differing, is_run, read_run, run_folders

    given = [expand_home(folder) for folder in folders] or [Path(".")]
    found = list(dict.fromkeys(run for folder in given for run in run_folders(folder)))
    below = len(given) == 1 and found != given
    names = [str(run.relative_to(given[0])) for run in found] if below else short_names(found)
    read = [read_run(folder, name) for folder, name in zip(found, names)]
    rows = [describe(run) for run in read]
    compared = len(given) > 1 and all(map(is_run, given))
    settings = {name: [run.config.get(name) for run in read] for name in differing(read)} if compared else {}
    if json:
        print_json({"runs": rows, "settings": settings} if compared else rows)
    elif compared:
        _print_comparison(rows, settings)
    else:
        _print_list(rows)


def describe(run: Any) -> dict[str, Any]:
    """One run of the list; figures that it does not have are None.

    Args:
        run: as `eval.runs.read_run` gives it.
    """
    from megatron_hylo.eval.runs import last_written, run_state

    state, message = run_state(run)
    newest = run.starts[-1] if run.starts else {}
    hosts = list(dict.fromkeys(device.split(":")[0] for device in newest.get("devices", [])))
    config, left = run.config, run.seconds_left() if state == "running" else None
    return {
        "name": run.name,
        "folder": str(run.folder),
        "stage": config.get("stage"),
        "model": config.get("model") or config.get("scratch"),
        "teacher": config.get("teacher") or config.get("teacher_store") or config.get("teacher_address"),
        "state": state,
        "message": message,
        "step": run.step,
        "total_steps": run.total_steps,
        "tokens": run.step * run.tokens_per_step,
        "loss": run.last("loss"),
        "heldout_perplexity": run.last("heldout_perplexity"),
        "heldout_kl": run.last("heldout_kl"),
        "tokens_per_second": run.last("tokens_per_second"),
        "peak_memory_gib": run.last("peak_memory_gib"),
        "seconds_left": None if left is None else round(left),
        "started": run.starts[0]["time"] if run.starts else None,
        "starts": len(run.starts),
        "job": run.jobs[-1]["job"] if run.jobs else None,
        "jobs": len({event["job"] for event in run.jobs}),
        "requeues": sum(event["event"] == "requeued" for event in run.jobs),
        "retries": sum(event["event"] == "retried" for event in run.jobs),
        "last_written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(last_written(run.folder))),
        "hosts": hosts,
        "devices": len(newest.get("devices", [])),
        "commit": newest.get("commit"),
        "version": newest.get("version"),
    }


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _short_commit(commit: str | None) -> str:
    hash, *dirty = (commit or "-").split("-", 1)
    return hash[:8] + ("-dirty" if dirty and dirty[0] else "")


def _started(row: dict[str, Any]) -> str:
    from megatron_hylo.eval.runs import seconds_of

    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds_of(row["started"]))) if row["started"] else "-"


def _host(row: dict[str, Any]) -> str:
    hosts, devices = row["hosts"], row["devices"]
    others = f" +{len(hosts) - 1}" if len(hosts) > 1 else ""
    return f"{hosts[0]}{others}{f' x{devices}' if devices > 1 else ''}" if hosts else "-"


def _job(row: dict[str, Any]) -> str:
    """Newest job of a run, and how often its jobs were put back into the queue and tried again."""
    one = {"requeues": "requeue", "retries": "retry"}
    again = [f"{row[name]} {one[name] if row[name] == 1 else name}" for name in one if row[name]]
    return (row["job"] or "-") + (f" ({', '.join(again)})" if again else "")


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "run": lambda row: row["name"],
    "stage": lambda row: row["stage"] or "-",
    "state": lambda row: row["state"],
    "step": lambda row: f"{row['step']:,}/{row['total_steps']:,}" if row["total_steps"] else f"{row['step']:,}",
    "tokens": lambda row: f"{row['tokens']:,}",
    "loss": lambda row: _number(row["loss"], ".4f"),
    "held-out ppl": lambda row: _number(row["heldout_perplexity"], ",.2f"),
    "KL": lambda row: _number(row["heldout_kl"], ".3f"),
    "started": _started,
    "host": _host,
    "job": _job,
    "model": lambda row: Path(row["model"]).name if row["model"] else "-",
    "teacher": lambda row: Path(row["teacher"]).name if row["teacher"] else "-",
    "commit": lambda row: _short_commit(row["commit"]),
}
NUMBERS = ("step", "tokens", "loss", "held-out ppl", "KL")


def _cells(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    return {title: [cell(row) for row in rows] for title, cell in COLUMNS.items()}


def _print_list(rows: Sequence[dict[str, Any]]) -> None:
    cells = _cells(rows)
    if not any(row["job"] for row in rows):
        del cells["job"]
    left_out = []
    for title in LEAST_IMPORTANT:
        if sum(max(map(len, (name, *column))) + 2 for name, column in cells.items()) <= results.width:
            break
        if title in cells:
            left_out.append(title)
            del cells[title]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in cells:
        table.add_column(title, justify="right" if title in NUMBERS else "left", overflow="fold")
    for index, row in enumerate(rows):
        table.add_row(*(_styled(title, cells[title][index], row) for title in cells))
    results.print(table)
    for row in rows:
        if row["message"]:
            results.print(f"{row['name']}: {row['message']}", style="dim", markup=False, highlight=False)
    if left_out:
        print_note(f"no room for {', '.join(reversed(left_out))}: a wider terminal or --json has all")


def print_note(text: str) -> None:
    """Print what is no result, in a soft colour on stderr."""
    from megatron_hylo.cli.console import console

    console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def _styled(title: str, text: str, row: dict[str, Any]) -> Text:
    return Text(text, style=STATE_STYLES[row["state"]] if title == "state" else "")


def _print_comparison(rows: Sequence[dict[str, Any]], settings: dict[str, list[Any]]) -> None:
    import json

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for title in ("", *(row["name"] for row in rows)):
        table.add_column(title, overflow="fold")
    figures = [(title, column) for title, column in _cells(rows).items() if title not in ("run", "model", "teacher")]
    rates = [_number(row["tokens_per_second"], ",.0f") for row in rows]
    memory = [_number(row["peak_memory_gib"], ".1f") for row in rows]
    for title, column in (*figures, ("tokens/s", rates), ("peak memory, GiB", memory)):
        table.add_row(Text(title, style="dim"), *(_styled(title, text, row) for text, row in zip(column, rows)))
    table.add_row()
    table.add_row(Text("settings that differ" if settings else "no settings differ", style="bold"))
    for name, values in settings.items():
        if name == "stage":
            continue  # is above
        table.add_row(
            Text(name, style="dim"), *(Text(value if isinstance(value, str) else json.dumps(value)) for value in values)
        )
    results.print(table)
