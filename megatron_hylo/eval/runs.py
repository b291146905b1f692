"""Run folders of `hylo train`: settings, records, and the state that each run is in.

Only files are read and nothing is written: config.json, metrics.jsonl, history.json, starts.jsonl, model/hylo.json and the lock
that a training process holds. So it works from another machine that shares the file system, while a run goes on.
"""

import json
import math
import os
import time
from calendar import timegm
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_hylo.config import ConfigError
from megatron_hylo.config.train_settings import flatten
from megatron_hylo.io import has_manifest, read_json, read_lock
from megatron_hylo.io.folder_kinds import hint

State = Literal["running", "finished", "stopped", "failed", "killed"]
STATES: dict[State, str] = {
    "running": "a process trains it now",
    "finished": "it took all its steps",
    "stopped": "a signal or Ctrl-C ended it; the same command goes on",
    "failed": "an error ended it",
    "killed": "its process is gone without a word: killed, out of memory, or its machine went down",
}
METRICS, STARTS, JOBS = "metrics.jsonl", "starts.jsonl", "jobs.jsonl"
SKIPPED_SETTINGS = ("output", "allow_change")  # differ between any two runs
DEPTH = 4  # folders below the one that is searched for runs
SILENT_SECONDS, SILENT_INTERVALS = 120.0, 10  # so long without a word, a run that cannot be asked is taken for killed


@dataclass
class Run:
    """Content of the files of one run folder."""

    name: str
    folder: Path
    config: dict[str, Any]  # flat: "optimizer.lr"
    records: list[dict[str, Any]]
    changes: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)  # flat: of the newest start
    provenance: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    jobs: list[dict[str, Any]] = field(default_factory=list)  # what the scripts of slurm/ did, oldest first

    @property
    def tokens_per_step(self) -> int:
        """Training tokens of one optimizer step."""
        return self.config.get("global_batch_size", 0) * self.config.get("sequence_length", 0)

    @property
    def total_steps(self) -> int:
        """Steps that the run takes in all; 0 where its settings do not say."""
        tokens = self.config.get("train_tokens", 0) + self.config.get("extend_tokens", 0)
        return -(-tokens // self.tokens_per_step) if self.tokens_per_step else 0

    @property
    def step(self) -> int:
        """Newest step with a record."""
        return int(self.last("step") or 0)

    def last(self, metric: str) -> float | None:
        """The newest value of a metric."""
        return next((r[metric] for r in reversed(self.records) if r.get(metric) is not None), None)

    def points(self, metric: str) -> list[tuple[float, float]]:
        """(training tokens, value) of every record that has a finite value of a metric."""
        return [
            (r.get("tokens", r["step"] * self.tokens_per_step), r[metric])
            for r in self.records
            if isinstance(r.get(metric), (int, float)) and math.isfinite(r[metric])
        ]

    def seconds_left(self) -> float | None:
        """Seconds to the last step at the mean speed of the newest start; None before that start's second record."""
        started = seconds_of(self.starts[-1]["time"]) if self.starts else 0.0
        steps = [(r["time"], r["step"]) for r in self.records if r.get("time", 0.0) >= started and "tokens" in r]
        if len(steps) < 2 or steps[-1][1] == steps[0][1]:
            return None
        (first, begun), (now, step) = steps[0], steps[-1]
        return max(0.0, (now - first) / (step - begun) * (self.total_steps - step))


def run_folders(folder: Path) -> list[Path]:
    """The folder itself if it is a run's, else the runs up to four folders below it, in the order in which they were started.

    Raises:
        ConfigError: there is none.
    """
    if is_run(folder):
        return [folder]
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file, not a run folder" if folder.exists() else f"{folder}: there is no such folder")
    inside = list(_search(folder, DEPTH))
    if not inside:
        raise ConfigError(
            f"{folder} is not the output of a training run: it has no config.json with {METRICS}, nor has a folder in it"
            f"{hint(folder, 'run')}"
        )
    return sorted(inside, key=_begun)


def _search(folder: Path, depth: int) -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = folder / entry.name
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        if is_run(path):
            yield path
        elif depth > 1 and not has_manifest(path) and os.access(path, os.R_OK | os.X_OK):
            yield from _search(path, depth - 1)


def _begun(run: Path) -> tuple[float, str]:
    """Time of a run's first start, or of its settings where none was recorded."""
    file = run / STARTS
    if file.is_file():
        with open(file, errors="replace") as lines:
            record = parse_line(lines.readline())
        if record and "time" in record:
            return seconds_of(record["time"]), str(run)
    return (run / "config.json").stat().st_mtime, str(run)


def is_run(folder: Path) -> bool:
    """Whether a folder is the output of a training run that has started."""
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in (METRICS, STARTS))


def read_run(folder: Path, name: str) -> Run:
    """Read what there is of one run.

    Args:
        folder: output of `hylo train`.
        name: to show.

    Raises:
        ConfigError: config.json or history.json cannot be read.
    """
    model = _read(folder / "model" / "hylo.json")
    starts = read_lines(folder / STARTS)
    newest = {key: value for key, value in starts[-1].items() if key != "config"} if starts else {}
    environment = {"starts": len(starts), **newest} if starts else {}
    return Run(
        name=name,
        folder=folder,
        config=flatten(read_json(folder / "config.json")),
        records=read_records(folder),
        changes=_read(folder / "history.json").get("changes", []),
        environment=flatten(environment),
        provenance=flatten(model.get("provenance", {})),
        starts=starts,
        jobs=read_lines(folder / JOBS),
    )


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Records of a run's metrics.jsonl."""
    return [record for record in read_lines(folder / METRICS) if "step" in record]


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Objects of a file with one JSON object a line, without one that is half written; none where there is no file."""
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    return [record for line in lines if (record := parse_line(line)) is not None]


def parse_line(line: str) -> dict[str, Any] | None:
    """Object of one JSON line; None of a line that is half written, by a crash or a run that goes on."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def learning_rates(record: dict[str, Any]) -> str:
    """Learning rates of a record in words: "lr mixers 0.0007, other 0.00015", "lr 0.001" where all are one; "" without any."""
    start = "learning_rate_"
    rates = {name.removeprefix(start): f"{value:.3g}" for name, value in record.items() if name.startswith(start)}
    if not rates:
        return ""
    alike = len(set(rates.values())) == 1
    return "lr " + (next(iter(rates.values())) if alike else ", ".join(f"{name} {rate}" for name, rate in rates.items()))


def differing(runs: Sequence[Run]) -> list[str]:
    """Names of the settings that are not the same in all runs."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    values = {name: {json.dumps(run.config.get(name)) for run in runs} for name in names}
    return [name for name in names if len(values[name]) > 1 and name not in SKIPPED_SETTINGS]


def run_state(run: Run) -> tuple[State, str]:
    """State of a run, and the words with which it ended (empty where it left none).

    A training process holds the lock of its run folder, or `hylo quickstart` that of the folder around it, and its last record
    says how it ended. A killed one leaves a lock file that nobody holds. Where locks do not tell (another machine, a file
    system without locks), a run that wrote something lately is taken to go on.
    """
    lock = read_lock(run.folder)
    if lock is not None and lock.own and _is_alive(run, lock.held, lock.about):
        return "running", ""
    started = seconds_of(run.starts[-1]["time"]) if run.starts else 0.0
    last = run.records[-1] if run.records else {}
    if "ended" in last and last.get("time", 0.0) >= started:
        return last["ended"], last.get("message", "")
    if run.total_steps and run.step >= run.total_steps and has_manifest(run.folder / "model"):
        return "finished", ""  # by a version that did not record the end
    if lock is not None and _is_alive(run, lock.held, lock.about):
        return "running", ""
    return ("stopped", "how it ended was not recorded") if lock is None else ("killed", STATES["killed"])


def _is_alive(run: Run, held: bool | None, about: dict[str, Any]) -> bool:
    if held or (held is False and about.get("host") == os.uname().nodename):
        return bool(held)
    times = [r["time"] for r in run.records if "tokens" in r and "time" in r][-20:]
    gaps = sorted(after - before for before, after in zip(times, times[1:]))
    patience = max(SILENT_SECONDS, SILENT_INTERVALS * gaps[len(gaps) // 2] if gaps else 0.0)
    return time.time() - last_written(run.folder) < patience


def last_written(run: Path) -> float:
    """Time of a run's newest record or line, in seconds since 1970."""
    files = [run / name for name in (METRICS, "log.txt", STARTS, "config.json")]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def seconds_of(stamp: str) -> float:
    """Seconds since 1970 of a time that was recorded as 2026-11-29T10:47:33Z."""
    return timegm(time.strptime(stamp, "%Y-%m-%dT%H:%M:%SZ"))


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
