"""Cells of a sweep: each has a student, stages that train it, and evaluations; how far each is, by its files alone."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_hylo.config.evaluation import SuiteSettings
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.config.upcycle import UpcycleConfig
from megatron_hylo.eval.results import RESULTS
from megatron_hylo.eval.runs import read_lines, read_run, run_state
from megatron_hylo.io import MANIFEST

STOPPED = 3  # exit status of a cell that a signal ended
State = Literal["waiting", "running", "finished", "stopped", "failed", "killed"]


def digest(values: Any, length: int = 10) -> str:
    """First digits of the SHA-256 of settings, whatever the order of their names."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:length]


@dataclass(frozen=True)
class Measurement:
    """An evaluation that is taken of a stage's result, as `hylo eval` takes it.

    Args:
        name: as the specification calls it.
        settings: suites and what they measure.
        after: stages after which it is taken; None: all.
    """

    name: str
    settings: SuiteSettings
    after: tuple[str, ...] | None = None

    @property
    def folder(self) -> str:
        """Name of its results folder in a stage's; other settings have another one."""
        return f"{self.name}-{digest(asdict(self.settings), 6)}"


@dataclass(frozen=True)
class Stage:
    """One training stage of a cell, or a model that is only measured.

    Args:
        name: as the specification calls it; empty where a cell has one run alone.
        folder: of its run and evaluations; cells that begin alike share it.
        train: settings of its run; None: there is none, `model` is measured as it is.
        model: what the stage results in.
        measurements: taken of that.
    """

    name: str
    folder: Path
    train: TrainConfig | None
    model: Path
    measurements: tuple[Measurement, ...] = ()

    @property
    def run(self) -> Path:
        """Run folder."""
        return self.folder / "run"

    @property
    def files(self) -> list[Path]:
        """Files that are all there once it is finished: its model's manifest, and the results of its evaluations."""
        trained = [] if self.train is None else [self.model / MANIFEST]
        return trained + [self.results(one) / RESULTS for one in self.measurements]

    def results(self, measurement: Measurement) -> Path:
        """Results folder of an evaluation."""
        return self.folder / measurement.folder

    def unmeasured(self) -> list[Measurement]:
        """Evaluations that are still to be taken."""
        return [one for one in self.measurements if not (self.results(one) / RESULTS).is_file()]


@dataclass(frozen=True)
class Cell:
    """One cell of a sweep.

    Args:
        number: its place in the grid.
        name: of its folder.
        folder: of its notes, and of its run where it has no stages.
        varied: settings that tell it from the others, by name.
        stages: in their order.
        upcycle: settings of its student; None where there is a model already.
    """

    number: int
    name: str
    folder: Path
    varied: dict[str, Any]
    stages: list[Stage] = field(default_factory=list)
    upcycle: UpcycleConfig | None = None

    @property
    def last(self) -> Stage:
        """Stage that its result comes from."""
        return self.stages[-1]

    def state(self) -> tuple[State, str]:
        """State of the first stage that is not done, and the words with which it ended."""
        for stage in self.stages:
            if stage.train is not None:
                if not (stage.run / "config.json").is_file():
                    return self._not_started(f"stage {stage.name} has not begun" if stage.name else "")
                state, message = run_state(read_run(stage.run, self.name))
                if state != "finished":
                    return state, message
            if left := stage.unmeasured():
                return self._not_started(f"{stage.name or 'the result'} is not measured by {left[0].name} yet")
        return "finished", ""

    def _not_started(self, words: str) -> tuple[State, str]:
        attempts = self.attempts()
        if attempts and attempts[-1]["code"] not in (0, STOPPED):
            return "failed", attempts[-1].get("message", "")
        return "waiting", words if self.stages[0].folder.is_dir() else ""

    def attempts(self) -> list[dict[str, Any]]:
        """Starts of this cell on this machine that ended, oldest first: {code, seconds, message}."""
        return read_lines(self.folder / "attempts.jsonl")  # to which a sweep may be adding one
