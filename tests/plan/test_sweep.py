"""A sweep of tiny models: its cells, their runs, what is kept when the grid grows, its report, its Slurm array."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import yaml

from megatron_hylo.cli.main import main
from megatron_hylo.config import ConfigError
from megatron_hylo.plan.sweep import read_sweep
from megatron_hylo.plan.sweep_report import fit_metric, row_of
from tests.train.conftest import material, tokenizer  # noqa: F401  fixtures


@pytest.fixture
def spec(material, tmp_path):  # noqa: F811
    """Write a specification of tiny runs with changes; returns its file."""

    def write(**changes) -> Path:
        values = dict(
            output=str(tmp_path / "sweep"), teacher=str(material.teacher), student=dict(init="paper", linear="G"),
            train=dict(
                stage="distil", data=str(material.data), sequence_length=16, global_batch_size=4, micro_batch_size=4,
                precision="fp32", eval_windows=4, logging=dict(log_interval=1, tensorboard=False),
            ),
            grid={"student.mla": [1], "train.train_tokens": [64, 128, 256]},
        )  # fmt: skip
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values | changes))
        return tmp_path / "tiny.yaml"

    return write


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["sweep", *map(str, words)])
    return ended.value.code


def test_cells_run_each_by_itself_and_are_reported(spec, one_rank, capsys):
    file = spec()
    assert run(file, "--dry_run") == 0 and {cell.state()[0] for cell in read_sweep(file).cells} == {"waiting"}
    for number in range(3):
        assert run(file, "--cell", number) == 0
    assert run(file) == 0, "nothing is left to run"
    cells = read_sweep(file).cells
    assert len({cell.upcycle.output for cell in cells}) == 1, "cells of equal students share one"
    assert json.loads((Path(cells[0].upcycle.output) / "hylo.json").read_text())["model"]["hybrid_layer_pattern"] == "G-G-+-G-"
    capsys.readouterr()
    assert run("report", file, "--json", "--samples", 50) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["finished"] == 3 and {fit["metric"] for fit in report["fits"]} == {"heldout_kl"}
    table = pyarrow.parquet.read_table(cells[0].folder.parents[1] / "results.parquet").to_pylist()
    assert [(row["tokens"], row["train.train_tokens"]) for row in table] == [(64, 64), (128, 128), (256, 256)]
    last = [json.loads(line) for line in (cells[2].run / "metrics.jsonl").read_text().splitlines()]
    assert table[2]["heldout_kl"] == [line["heldout_kl"] for line in last if "heldout_kl" in line][-1]
    assert table[0]["mixers"] == "GG+G"
    page = (cells[0].folder.parents[1] / "report.md").read_text()
    assert "| 2 | 1 | 256 | finished | 1 | 256 |" in page and "exponent by tokens" in page
    records = (cells[2].run / "metrics.jsonl").read_text()
    diverged = [line | {"heldout_kl": math.nan} if "heldout_kl" in line else line for line in last[-3:]]
    (cells[2].run / "metrics.jsonl").write_text(records + "".join(json.dumps(line) + "\n" for line in diverged))
    assert "heldout_kl" not in row_of(cells[2]), "a run that diverged is not reported by what it was before"
    (cells[2].run / "metrics.jsonl").write_text(records)
    more = {"student.mla": [1, [0, 3]], "train.train_tokens": [64, 128, 256]}
    grown = read_sweep(spec(grid=more, cells=[{"student.mla": 1, "train.seed": 5}])).cells
    assert [cell.state()[0] for cell in grown] == ["finished"] * 3 + ["waiting"] * 4
    assert grown[3].upcycle.pattern == "+GG+" and grown[6].upcycle == grown[0].upcycle


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_bad_input_is_not_tried_again(spec, material, tmp_path, capsys):  # noqa: F811
    """Two real cells side by side, killed in the middle; they save, and resume. A third cell has no text."""
    bad = {"student.mla": 1, "train.data": "/nowhere"}
    file = spec(grid={"student.mla": [1], "train.train_tokens": [12_800, 25_600]}, cells=[bad], at_once=3)
    command = [sys.executable, "-m", "megatron_hylo.cli", "sweep", str(file)]
    first, deadline = subprocess.Popen(command), time.monotonic() + 300
    *good, missing = read_sweep(file).cells
    while not all((cell.run / "metrics.jsonl").is_file() for cell in good):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.5)
    first.kill()
    while any(cell.state()[0] in ("waiting", "running") for cell in good):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert [cell.state()[0] for cell in good] == ["stopped", "stopped"]
    assert subprocess.run(command).returncode == 1
    assert [cell.state()[0] for cell in (*good, missing)] == ["finished", "finished", "failed"]
    assert all(len((cell.run / "starts.jsonl").read_text().splitlines()) == 2 for cell in good)
    attempt = missing.attempts()[-1]
    assert attempt["code"] == 2 and "/nowhere" in attempt["message"] and len(missing.attempts()) <= 2


@pytest.mark.slow
def test_a_sweep_that_is_stopped_while_its_cells_start_has_none_that_failed(spec):
    file = spec(at_once=2)
    first, deadline = subprocess.Popen([sys.executable, "-m", "megatron_hylo.cli", "sweep", str(file)]), time.monotonic() + 120
    cell = read_sweep(file).cells[0]
    while not (cell.folder / "log.txt").is_file():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    first.terminate()
    assert first.wait(120) == 3
    assert [cell.state()[0] for cell in read_sweep(file).cells] == ["waiting"] * 3 and cell.attempts()[0]["code"] == 3


def test_a_specification_that_is_not_yaml_is_refused(tmp_path):
    (tmp_path / "torn.yaml").write_text("grid: {student.mla: [1")
    with pytest.raises(ConfigError, match="torn.yaml is not YAML: while parsing"):
        read_sweep(tmp_path / "torn.yaml")


def test_a_report_of_nothing_is_refused(spec, capsys):
    assert run("report", spec()) == 2 and "no cell of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grids": {}}, "unknown key 'grids'; known keys: output"),
        ({"grid": None}, "needs output, and grid or cells"),
        ({"grid": {"mla": [1]}}, "'mla' must be teacher, student.SETTING"),
        ({"grid": {"student.mla": 3}}, "grid.student.mla must be a list of values, got 3"),
        ({"grid": {"student.mla": [5]}}, "number of MLA layers must lie between 0 and 4, got 5"),
        ({"grid": {"student.mla": [[4]]}}, "student.mla 4 is no layer; the teacher has 4"),
        ({"grid": {"student.mla": [2, 2]}}, "is there twice"),
        ({"grid": {"student.mla": [1], "train.lr": [1]}}, "cell 0 {'student.mla': 1, 'train.lr': 1}: train: "),
        ({"grid": {"train.seed": [1]}}, "cell 0 {'train.seed': 1}: a student needs layout, pattern or mla"),
        (
            {"grid": {"student.mla": [1], "train.micro_batch_size": [3]}},
            "global_batch_size 4 must be a multiple of micro_batch_size 3",
        ),
        ({"retries": -1}, "retries must be a whole number of at least 0"),
        ({"grid": [1]}, "grid must be lists of values by name, got [1]"),
        ({"grid": None, "cells": [1]}, "cell 0 1: a cell must be settings by name"),
        ({"grid": {"student.mla": ["4"]}}, "student.mla must be a number of layers or a list of layers, got '4'"),
        ({"grid": {"student.mla": [1], "train.output": ["x"]}}, "train.output must be left out"),
    ],
)
def test_every_cell_is_checked_before_any_runs(spec, changes, words):
    with pytest.raises(ConfigError) as error:
        read_sweep(spec(**changes))
    assert words in str(error.value)


def test_a_fit_finds_the_power_law_that_made_the_numbers_and_covers_it():
    noise, rows = np.random.default_rng(1), []
    for tokens in (1e5, 3e5, 1e6):
        for size in (100, 200, 400, 800):
            loss = 5.0 * tokens**-0.2 * size**-0.1 * np.exp(0.01 * noise.standard_normal())
            rows.append({"tokens": tokens, "kv_bytes_per_token": size, "kl": loss, "share": 0.1 + 0.05 * np.log(tokens)})
    found = fit_metric(rows, "kl", "loss", True, 500)
    for name, exponent in (("tokens", -0.2), ("kv_bytes_per_token", -0.1)):
        c = found["coefficients"][name]
        assert c["low"] < exponent < c["high"] and c["high"] - c["low"] < 0.05
    middle, low, high = found["predict"](np.array([[3e5, 200.0]]))
    assert low < middle < high and middle == pytest.approx(5.0 * 3e5**-0.2 * 200**-0.1, rel=0.02)
    assert fit_metric(rows, "share", "recall", False, 50)["coefficients"]["tokens"]["value"] == pytest.approx(0.05)
    assert fit_metric(rows[:3], "kl", "loss", True, 50)["names"] == ["kv_bytes_per_token"], "tokens are the same in all"
    together = [row | {"tokens": 1e3 * row["kv_bytes_per_token"]} for row in rows]
    assert fit_metric(together, "kl", "loss", True, 50) is None, "tokens and cache cannot be told apart"
    assert fit_metric(rows[:2], "kl", "loss", True, 50) is None


def test_a_slurm_array_gives_each_task_its_cell(spec, material, tmp_path):  # noqa: F811
    train = dict(stage="distil", data=str(material.data), model=str(material.student), sequence_length=16, global_batch_size=4)
    file = spec(student=None, grid={"train.seed": [1, 2]}, train=train)
    assert run(file, "--slurm", "--at_once", 2) == 0
    script = tmp_path / "sweep" / "slurm" / "sweep.sh"
    assert "#SBATCH --array=0,1%2\n" in script.read_text()
    cell = read_sweep(file).cells[1]
    assert yaml.safe_load((cell.folder / "recipe.yaml").read_text())["seed"] == 2
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "1", "HYLO_CHECK_ONLY": "none"}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"{cell.folder}/run_1", done.stderr
    done = subprocess.run(["bash", str(script)], env=environment | {"SLURM_ARRAY_TASK_ID": "7"}, capture_output=True, text=True)
    assert done.returncode == 2 and "cell 7 is none of 0,1" in done.stderr
