"""A sweep of tiny models: its cells, their runs, what is kept when the grid grows, its report, its Slurm array."""

import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import yaml

from megatron_hylo.config import ConfigError, TeacherWindow
from megatron_hylo.config.layouts import uniform_mixers
from megatron_hylo.config.train import OptimizerSettings
from megatron_hylo.config.upcycle import UpcycleConfig
from megatron_hylo.plan.sweep import read_sweep, selected_layers
from megatron_hylo.plan.sweep_cells import Cell
from megatron_hylo.plan.sweep_plots import draw_cells
from megatron_hylo.plan.sweep_report import cell_name, comparable, fit_metric
from megatron_hylo.plan.sweep_rows import row_of
from tests.plan.conftest import run


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
    last = [json.loads(line) for line in (cells[2].last.run / "metrics.jsonl").read_text().splitlines()]
    assert table[2]["heldout_kl"] == [line["heldout_kl"] for line in last if "heldout_kl" in line][-1]
    assert table[0]["mixers"] == "GG+G"
    page = (cells[0].folder.parents[1] / "report.md").read_text()
    assert "| 2 | 1 | 256 | finished | 1 | 256 |" in page and "exponent by tokens" in page
    records = (cells[2].last.run / "metrics.jsonl").read_text()
    diverged = [line | {"heldout_kl": math.nan} if "heldout_kl" in line else line for line in last[-3:]]
    (cells[2].last.run / "metrics.jsonl").write_text(records + "".join(json.dumps(line) + "\n" for line in diverged))
    assert "heldout_kl" not in row_of(cells[2]), "a run that diverged is not reported by what it was before"
    (cells[2].last.run / "metrics.jsonl").write_text(records)
    more = {"student.mla": [1, [0, 3]], "train.train_tokens": [64, 128, 256]}
    grown = read_sweep(spec(grid=more, cells=[{"student.mla": 1, "train.seed": 5}])).cells
    assert [cell.state()[0] for cell in grown] == ["finished"] * 3 + ["waiting"] * 4
    assert grown[3].upcycle.pattern == "+GG+" and grown[6].upcycle == grown[0].upcycle


def test_an_attempt_that_is_being_recorded_is_not_read_yet(tmp_path):
    (tmp_path / "attempts.jsonl").write_text('{"code": 3, "seconds": 1.5, "message": ""}\n{"code": 1, "seco')
    assert [attempt["code"] for attempt in Cell(0, "one", tmp_path, {}).attempts()] == [3]


def test_a_specification_that_is_not_yaml_is_refused(tmp_path):
    (tmp_path / "torn.yaml").write_text("grid: {student.mla: [1")
    with pytest.raises(ConfigError, match="torn.yaml is not YAML: while parsing"):
        read_sweep(tmp_path / "torn.yaml")


def test_a_report_of_nothing_is_refused(spec, capsys):
    assert run("report", spec()) == 2 and "no cell of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grids": {}}, "unknown key 'grids'; known keys: base, output"),
        ({"grid": None}, "needs output, and grid or cells"),
        ({"grid": {"mla": [1]}}, "'mla' must be label, teacher, student.SETTING"),
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
        ({"retries": -1}, ".yaml: retries must be a whole number of at least 0, got -1"),
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


def test_a_fit_is_of_cells_that_differ_in_tokens_seed_and_layers_alone():
    def cell(number, pattern, **varied):
        upcycle = UpcycleConfig(teacher="teacher", output="student", pattern=pattern)
        named = {name.replace("__", "."): value for name, value in varied.items()}
        return Cell(number, str(number), Path(), named, upcycle=upcycle)

    cells = [
        cell(0, "++GGGG", label="a"), cell(1, "++GGGG", label="b", stages__2k__train_tokens=5),
        cell(2, "+GGGGG", label="c", train__seed=4, student__mla=[0]), cell(3, "GG++GG", student__mla=[2, 3]),
        cell(4, uniform_mixers(6, 2, "G"), label="even", student__mla=2), cell(5, "++GGGG", student__init="paper"),
        cell(6, "++GGGG", student__init="paper", train__train_tokens=7),
    ]  # fmt: skip
    assert comparable(cells) == {0, 1, 2}, "3 chose other layers than 0 and 1"
    assert comparable(cells[3:]) == {5, 6} and comparable([]) == set()
    given = {0: {}, 1: {"student__mla": 1}, 2: {"student__mla": 3}}
    even = [cell(number, uniform_mixers(6, own.get("student__mla", 2), "G"), **own) for number, own in given.items()]
    assert comparable(even) == {0, 1, 2}, "the number of evenly spread layers may be the specification's own"
    assert [cell_name(one, ["label", "student.init"]) for one in cells[4:6]] == ["even", "student.init paper"]


def test_a_picture_of_cells_has_a_dot_for_each_measured_one(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, plain = [], Axes.errorbar

    def errorbar(axes, values, places, **looks):
        drawn.append((list(values), list(places), list(looks["xerr"])))
        return plain(axes, values, places, **looks)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    named = [("dense", {"r": 0.9, "r s.e.": 0.1}), ("ours" * 30, {"kl": 0.3, "r": 0.5}), ("paper", {"kl": 2.0})]
    file = draw_cells(named, "kl", "r", tmp_path / "cells.png")
    assert drawn == [([0.3, 2.0], [1, 2], [0.0, 0.0]), ([0.9, 0.5], [0, 1], [0.1, 0.0])]
    assert file.read_bytes().startswith(b"\x89PNG")


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


PROGRAM = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$HYLO_ROOT/words"
for file in ${WRITES:-}; do mkdir -p "$(dirname "$file")" && echo {} >"$file"; done
[[ -z "${WRITES:-}" ]] || exit 1
[[ -n "${STAYS:-}" ]] || exit 0
trap 'mkdir -p "$STAYS/checkpoints/step_00000007"; echo {} >"$STAYS/checkpoints/step_00000007/manifest.json"; exit 3' USR1
touch "$HYLO_ROOT/began"
while :; do sleep 0.1; done
"""


def test_a_slurm_array_takes_each_cell_through_its_stages(spec, tmp_path, monkeypatch):
    """The real script with a program in place of Python: what it is started with, how it is stopped, what it leaves behind."""
    monkeypatch.chdir(tmp_path)
    stages = {"align": {"stage": "align", "train_tokens": 64}, "long": {"train_tokens": 128, "sequence_length": 32}}
    file = spec(stages=stages, evaluate=EVALUATE, grid={"student.mla": [1], "stages.long.seed": [1, 2]})
    assert run(file, "--slurm", "--at_once", 2) == 0
    script, one = tmp_path / "sweep" / "slurm" / "sweep.sh", read_sweep(file).cells[1]
    assert "#SBATCH --array=0,1%2\n" in script.read_text()
    program, root = tmp_path / "program", tmp_path / "root"
    root.mkdir()
    program.write_text(PROGRAM)
    program.chmod(0o755)
    own = {"SLURM_ARRAY_TASK_ID": "1", "HYLO_PYTHON": str(program), "HYLO_ROOT": str(root), "MAX_RETRIES": "0"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "HYLO"))} | own

    def last_event() -> tuple[str, str]:
        event = json.loads((one.folder / "jobs.jsonl").read_text().splitlines()[-1])
        return event["event"], event["checkpoint"]

    def call(**changes: str) -> subprocess.CompletedProcess:
        return subprocess.run(["bash", str(script)], env=environment | changes, cwd="/", capture_output=True, text=True)

    done = call()
    assert done.returncode == 0 and last_event() == ("finished", ""), done.stderr
    assert (root / "words").read_text().split() == ["-m", "megatron_hylo.cli", "sweep", str(file), "--cell", "1"]
    stays = environment | {"STAYS": str(one.last.run)}
    task = subprocess.Popen(
        ["bash", str(script)], env=stays, cwd="/", stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        while not (root / "began").is_file():
            assert task.poll() is None
            time.sleep(0.02)
        task.send_signal(signal.SIGUSR1)
        output, _ = task.communicate(timeout=60)
    finally:
        if task.poll() is None:
            os.killpg(task.pid, signal.SIGKILL)
    name = f"{one.last.folder.name}/step_00000007"
    assert task.returncode == 3 and f"{one.last.run}/checkpoints/step_00000007: run the same command to resume" in output
    assert last_event() == ("stopped", name) and not (one.folder / "stop_requested").exists()
    *most, last = map(str, (file for stage in one.stages for file in stage.files))
    assert call(WRITES=" ".join(most)).returncode == 1 and last_event() == ("failed", name)
    assert call(WRITES=last).returncode == 0 and last_event() == ("finished", name), (
        "it ended badly, with all that was asked for"
    )
    done = call(SLURM_ARRAY_TASK_ID="7")
    assert done.returncode == 2 and "cell 7 is none of 0,1" in done.stderr
    done = call(DRY_RUN="1")
    assert done.returncode == 2 and f"hylo sweep {file} --dry_run checks all cells" in done.stderr


EVALUATE = {"text": {"suites": ["ppl"], "lengths": [64, 128, 4096], "limit": 1, "sequence_length": 16}}


def test_stages_follow_each_other_are_shared_and_are_measured(spec, material, one_rank, tmp_path, capsys):
    """Two hybrids of a common first stage and the teacher as it is; every run and evaluation is real."""
    (tmp_path / "longer.yaml").write_text(yaml.safe_dump({"sequence_length": 32, "global_batch_size": 1, "stage": "pretrain"}))
    base = spec(
        stages={"align": {"stage": "align", "train_tokens": 64}, "long": {"recipe": "longer.yaml", "global_batch_size": 2}},
        evaluate=EVALUATE, grid={"student.mla": [1]},
    )  # fmt: skip
    train = {"train_tokens": 128, "micro_batch_size": 1, "sequence_length": 16, "stage": "distil"}
    cells = [
        {"label": "one"},
        {"label": "another", "stages.long.seed": 5},
        {"label": "unaligned", "stages.align": None},
        {"label": "teacher", "student": None, "stages": None, "train.model": str(material.teacher)},
    ]
    file = tmp_path / "over.yaml"
    over = {"base": base.name, "student": {"mla": 1}, "train": train, "stages": {"long": {"sequence_length": 24}}}
    file.write_text(yaml.safe_dump(over | {"cells": cells}))
    one, another, unaligned, teacher = read_sweep(file).cells
    assert [stage.name for stage in one.stages] == ["align", "long"] and one.stages[0] == another.stages[0]
    assert one.last.folder != another.last.folder and [stage.name for stage in unaligned.stages] == ["long"]
    made = one.last.train
    assert (made.stage, made.sequence_length, made.global_batch_size, made.train_tokens) == ("distil", 24, 2, 128)
    assert made.model == f"{one.stages[0].folder}/run/model" and one.stages[0].train.model == one.upcycle.output
    assert unaligned.last.train.model == one.upcycle.output and teacher.last.model == material.teacher
    assert run(file, "--cell", 0) == 0 and [cell.state()[0] for cell in (one, another)] == ["finished", "waiting"]
    trained = (one.stages[0].run / "metrics.jsonl").stat().st_mtime_ns
    assert run(file, "--cell", 1) == 0 and run(file, "--cell", 3) == 0
    assert (one.stages[0].run / "metrics.jsonl").stat().st_mtime_ns == trained, "the common stage ran once"
    capsys.readouterr()
    assert run("report", file, "--json", "--samples", 9) == 0
    assert json.loads(capsys.readouterr().out)["states"][unaligned.name] == "waiting"
    rows = pyarrow.parquet.read_table(tmp_path / "sweep" / "results.parquet").to_pylist()
    assert [(row["cell"], row["stage"]) for row in rows] == [
        (0, "align"), (0, "long"), (1, "align"), (1, "long"), (2, ""), (3, "start"),
    ]  # fmt: skip
    assert [row["tokens"] for row in rows[:2]] == [64, 64 + 144], "tokens of all stages so far, in whole steps"
    assert rows[3]["train.seed"] == 5 and rows[1]["heldout_kl"] != rows[3]["heldout_kl"]
    measured = json.loads((one.last.results(one.last.measurements[0]) / "results.json").read_text())["scores"]
    (perplexity,) = [score["value"] for score in measured if score["task"] == "heldout"]
    assert rows[1]["text/ppl/heldout/perplexity/16"] == perplexity
    page = (tmp_path / "sweep" / "report.md").read_text()
    assert f"| 0 | one | long | finished | 1 | {64 + 144} |" in page and f" {perplexity:.4f} |" in page
    assert run(file, "--cell", 2) == 0
    capsys.readouterr()
    assert run("report", file, "--json", "--samples", 9) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] == [], "one differs from another in its seed alone, from the others in more"
    assert str(tmp_path / "sweep" / "cells.png") in report["files"]
    assert "![cells](cells.png)" in (tmp_path / "sweep" / "report.md").read_text()
    assert f"hylo export {one.last.model} {tmp_path}/sweep/exports/one-{one.last.folder.name}\n" in page
    assert "## text: ppl, by_position, perplexity\n\n| cell | label | stage | tokens | 64 | 128 |" in page, (
        "4,096 is past the window"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluate": {"x": {"suites": ["recal"]}}}, "evaluate.x: no suite 'recal'; choose out of ppl"),
        ({"evaluate": {"x": {"suite": "ppl"}}}, "evaluate.x must have suites, and settings out of suites, data, limit"),
        ({"evaluate": {"x": {"suites": ["ppl"], "after": ["8k"]}}}, "evaluate.x.after has '8k', which is none of stages"),
        ({"stages": {"a": 3}}, "stages.a must be settings of `hylo train` by name, or null, got 3"),
        ({"cells": [{"stages.b.seed": 1}], "grid": None}, "'stages.b.seed' is of no stage; the stages are not given"),
        ({"base": "nowhere.yaml"}, "there is no base nowhere.yaml"),
        ({"base": "tiny.yaml"}, "tiny.yaml is its own base"),
        ({"grid": {"student.mla": [{"count": 3}]}}, "must have selection (a folder of `hylo select`) and count"),
        ({"grid": {"student.mla": [{"selection": "nowhere", "count": 3}]}}, "there is no nowhere/selection.json; `hylo select"),
    ],
)
def test_stages_evaluations_and_bases_are_checked(spec, changes, words):
    with pytest.raises(ConfigError) as error:
        read_sweep(spec(**changes))
    assert words in str(error.value)


def test_null_in_a_cell_drops_what_a_recipe_sets(spec, tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    recipe = {"teacher_window": {"mode": "rope", "rope_scaling": yarn}, "optimizer": {"lr": 1.0}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    cells = [
        {"student.mla": 1},
        {"student.mla": 1, "stages.a.teacher_window": {"mode": "windows", "rope_scaling": None}, "stages.a.optimizer": None},
        {"student.mla": 1, "stages.a.teacher_window": None},
    ]
    file = spec(stages={"a": {"recipe": "recipe.yaml"}}, grid=None, cells=cells)
    kept, windows, none = (cell.last.train for cell in read_sweep(file).cells)
    assert kept.teacher_window.rope_scaling.factor == 4 and kept.optimizer.lr == 1
    assert windows.teacher_window == TeacherWindow("windows") and windows.optimizer == OptimizerSettings()
    assert none.teacher_window == TeacherWindow() and none.optimizer.lr == 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"optimizer": {"lr": 1.0, "mixer_lr": 2.0}}))
    rate = {"student.mla": 1, "stages.a.optimizer.lr": 7.0}
    for stage, train, cell in (
        ({"optimizer": None}, {}, rate),
        ({}, {}, {"student.mla": 1, "stages.a.optimizer": None} | rate),
        ({}, {"optimizer": None}, {"student.mla": 1, "train.optimizer.lr": 7.0}),
    ):
        stages = {"a": {"recipe": "recipe.yaml"} | stage}
        given = yaml.safe_load(file.read_text())["train"] | train
        found = read_sweep(spec(stages=stages, train=given, grid=None, cells=[cell])).cells[0].last.train
        assert (found.optimizer.lr, found.optimizer.mixer_lr) == (7.0, None)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ConfigError, match="a.teacher_window.*set teacher_window.rope_scaling null, which drops a recipe's"):
        read_sweep(
            spec(
                stages={"a": {"recipe": "recipe.yaml"}}, grid={"student.mla": [1], "stages.a.teacher_window.mode": ["windows"]}
            )
        )


def test_stages_of_a_specification_and_its_base_have_one_order(spec, tmp_path):
    base = spec(stages={"b": {}, "d": {}}, grid={"student.mla": [1]})

    def names(*stages: str) -> list[str]:
        file = tmp_path / "over.yaml"
        file.write_text(yaml.safe_dump({"base": base.name, "stages": {s: {"seed": 3} for s in stages}}, sort_keys=False))
        return [stage.name for stage in read_sweep(file).cells[0].stages]

    assert names("a", "b", "c", "d") == ["a", "b", "c", "d"] and names("d") == ["b", "d"]
    with pytest.raises(ConfigError, match=r"stages must name all of its base's \(b, d\) beside its own"):
        names("a", "d")


def test_layers_come_from_a_selection_and_its_order_tells_other_counts(tmp_path):
    def write(**found) -> dict:
        (tmp_path / "selection.json").write_text(json.dumps({"pattern": "GG+G+", "mla_layers": [2, 4]} | found))
        return {"selection": str(tmp_path)}

    greedy = write(method="greedy", order=[4, 2])
    assert [selected_layers(greedy | {"count": n}) for n in (1, 2)] == [[4], [2, 4]]
    with pytest.raises(ConfigError, match="tells the layers for 1 to 2 MLA layers, not for 3"):
        selected_layers(greedy | {"count": 3})
    backward = write(method="backward", order=[0, 3, 1])
    assert [selected_layers(backward | {"count": n}) for n in (2, 4)] == [[2, 4], [1, 2, 3, 4]]
    smart = write(method="smart", order=None)
    assert selected_layers(smart | {"count": 2}) == [2, 4]
    with pytest.raises(ConfigError, match="for 2 MLA layers, not for 3"):
        selected_layers(smart | {"count": 3})
