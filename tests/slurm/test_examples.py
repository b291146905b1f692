"""The result run: its commands are accepted on a CPU and a GPU, it goes on where it was, and all of it runs on tiny models."""

import json
import os
import random
import shutil
import signal
import string
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard

from megatron_hylo.cli.main import VERBS, main
from megatron_hylo.cli.parser import build_parser
from megatron_hylo.config.layouts import BASES
from megatron_hylo.config.recipes import recipe_files
from megatron_hylo.plan.sweep import Cell, read_sweep
from megatron_hylo.plan.sweep_rows import row_of
from tests.conftest import tiny_hf_model
from tests.data.conftest import tokenizer  # noqa: F401  the fixture

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "smollm2"
LAYOUT = "smollm2-135m-8mla22gdn-teacher"
ORDER = [23, 20, 1, 16, 18, 0, 17, 24, 6, 19, 29, 2, 12]
RECORD = """
printf '%s\\0' "$@" >>"$RECORD"; printf '\\n' >>"$RECORD"
case "$1" in fetch) echo a; exit ;; esac
made="$3"
[[ "$1" != calibrate ]] || made="$4"
[[ "$1" != sweep ]] || made="$OUT/sweep"
[[ "$1" != scripts ]] || made="$2"
words=("$@")
for i in "${!words[@]}"; do [[ "${words[i]}" != --output ]] || made="${words[i + 1]}"; done
[[ "$1" != train ]] || made+=/model
mkdir -p "$made"
[[ "$1" != sweep ]] || echo "hylo export $OUT/model $OUT/exports/one" >"$made/report.md"
"""


def program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


def selections(folder: Path) -> None:
    """Choices of `hylo select`, and a folder with the shape of the teacher."""
    for by in ("kl", "recall", "both"):
        (folder / f"select_{by}").mkdir(parents=True)
        found = {"method": "greedy", "order": ORDER, "mla_layers": sorted(ORDER), "pattern": "G" * 30}
        (folder / f"select_{by}" / "selection.json").write_text(json.dumps(found))
    (folder / "teacher").mkdir()
    (folder / "teacher" / "hylo.json").write_text(json.dumps({"model": BASES["smollm2-135m"].to_dict()}))


@pytest.fixture
def script(tmp_path):
    """(gpu, parts, variables) -> ended process, calls of a `hylo` that makes folders and notes how it was called."""
    out, recipes = tmp_path / "out", tmp_path / "out" / "recipes" / "megatron_hylo" / "recipes"
    selections(out)
    recipes.mkdir(parents=True)
    for name, text in recipe_files(LAYOUT).items():
        (recipes / name).write_text(text)
    program(tmp_path, "hylo", RECORD)

    def run(gpu: bool, *parts: str, **variables: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
        program(tmp_path, "nvidia-smi", 'echo "GPU 0: made"' if gpu else "exit 9")
        (tmp_path / "record").write_text("")
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        given = {"PATH": path, "RECORD": str(tmp_path / "record"), "OUT": str(out)} | variables
        command = ["bash", str(EXAMPLES / "result.sh"), *parts]
        done = subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True)
        return done, [line.split("\0")[:-1] for line in (tmp_path / "record").read_text().split("\n")[:-1]]

    return run


@pytest.mark.parametrize("gpu", [False, True])
def test_the_parts_are_commands_that_are_accepted(script, tmp_path, gpu):
    parser = build_parser(VERBS)
    shutil.rmtree(tmp_path / "out" / "select_recall")
    done, calls = script(gpu)
    assert (done.returncode, "no GPU here" in done.stderr) == (0, not gpu), done.stderr
    verbs = [call[0] for call in calls]
    assert verbs == [
        "fetch", "preprocess", "calibrate", "fetch", "preprocess", "upcycle", "upcycle", "train", "select", "sweep", "sweep",
        "export",
    ]  # fmt: skip
    for call in calls:
        parser.parse_args(call)
    assert [call[call.index("--pattern") + 1] for call in calls if call[0] == "upcycle"] == ["+" * 30, "G" * 30]
    assert [call[0] for call in script(gpu)[1]] == ["sweep", "sweep"], "the rest is there"


def recall_by_stage(cell: Cell) -> list[tuple[float, float]]:
    """Share of the text and weight of answers in each stage."""
    return [(stage.train.recall.share, stage.train.recall.answer_weight) for stage in cell.stages]


def cross_entropy_by_stage(cell: Cell) -> list[float]:
    """Weight of text's cross-entropy beside the KL's 1 in each stage."""
    assert {stage.train.distil.kl_weight for stage in cell.stages} == {1.0}
    return [stage.train.distil.ce_weight for stage in cell.stages]


@pytest.mark.parametrize("gpu", [False, True])
def test_its_specification_has_three_budgets_and_growing_lengths(script, tmp_path, gpu):
    done, _ = script(gpu, "train")
    assert done.returncode == 0, done.stderr
    teacher, *hybrids = read_sweep(tmp_path / "out" / "result.yaml").cells
    assert teacher.last.train is None and teacher.last.model == tmp_path / "out" / "teacher"
    assert [round(row_of(cell)["kv_percent"], 1) for cell in hybrids] == ([5.6, 11.1, 18.1, 11.1, 11.1] if gpu else [11.1])
    assert [cell.last.train.seed for cell in hybrids] == ([77, 77, 77, 78, 77] if gpu else [77])
    assert hybrids[0].upcycle.pattern == "".join("+" if n in ORDER[: 4 if gpu else 8] else "G" for n in range(30))
    lengths = [2048, 8192, 32768, 65536] if gpu else [256, 512, 1024, 2048]
    for cell in hybrids:
        assert [stage.name for stage in cell.stages] == ["2k", "8k", "32k", "64k"]
        assert [stage.train.sequence_length for stage in cell.stages] == lengths
        assert [stage.train.teacher_window.mode for stage in cell.stages] == ["none"] * 2 + ["windows"] * 2
        steps = [stage.train.global_batch_size * stage.train.sequence_length for stage in cell.stages]
        assert steps == ([16384, 32768, 32768, 65536] if gpu else [2048, 1024, 1024, 2048])
        assert [len(stage.measurements) for stage in cell.stages] == [3 if gpu else 2] * 4
        assert cell.last.train.eval_data == [f"{tmp_path}/out/unseen"]
        assert recall_by_stage(cell) == [(0.2 if gpu else 0.25, 1.0)] * 2 + [(0.3, 10.0)] * 2
        assert cross_entropy_by_stage(cell) == [0.0, 1.0, 1.0, 1.0]
    tokens = [stage.train.train_tokens for stage in hybrids[0].stages]
    assert tokens == ([40_000_000, 12_000_000, 10_000_000, 14_000_000] if gpu else [4096] * 4)
    done, _ = script(gpu, "train", STAGES="2k 8k", MLA_LAYERS="8", MORE_CELLS="-")
    _, alone = read_sweep(tmp_path / "out" / "result.yaml").cells
    assert alone.stages[0].folder in [cell.stages[0].folder for cell in hybrids], "what was trained of it stays"
    script(gpu, "train", STAGES="2k 64k", RECALL="0.4", ANSWER_WEIGHT="2", LONG_RECALL="0.5", LONG_ANSWER_WEIGHT="20")
    assert recall_by_stage(read_sweep(tmp_path / "out" / "result.yaml").cells[1]) == [(0.4, 2.0), (0.5, 20.0)]
    script(gpu, "train", STAGES="align 2k 8k 64k", CE_WEIGHT="0.2", CROSS_ENTROPY="answers")
    longer = read_sweep(tmp_path / "out" / "result.yaml").cells[1]
    assert [stage.train.stage for stage in longer.stages] == ["align"] + ["distil"] * 3
    assert cross_entropy_by_stage(longer) == [0.0, 0.0, 0.2, 0.2]
    assert [stage.train.recall.cross_entropy for stage in longer.stages] == ["all"] * 2 + ["answers"] * 2
    assert recall_by_stage(longer)[2:] == recall_by_stage(hybrids[0])[1::2]
    assert longer.stages[0].train.train_tokens == (3_000_000 if gpu else 2048)
    done, calls = script(gpu, "train", STAGES="align 9k")
    assert done.returncode == 2 and "there is no stage 9k; choose out of align 2k" in done.stderr and not calls
    done, calls = script(gpu, "tables")
    assert done.returncode == 2 and "there is no part tables" in done.stderr and not calls


def test_the_benchmark_of_recall_has_the_recipes_settings_at_each_length(script, tmp_path, monkeypatch):
    script(True, "train")
    ours = read_sweep(tmp_path / "out" / "result.yaml").cells[1]
    (tmp_path / "runs").mkdir()
    (tmp_path / "out").rename(tmp_path / "runs" / "result")
    monkeypatch.chdir(tmp_path)
    best, *others = read_sweep(ROOT / "benchmarks" / "recall_135m.yaml").cells
    assert recall_by_stage(best) == recall_by_stage(ours) == [(0.2, 1.0)] * 2 + [(0.3, 10.0)] * 2
    for stage, same in zip(best.stages, ours.stages, strict=True):
        assert stage.train.teacher_window == same.train.teacher_window
        assert stage.train.rope_scaling == same.train.rope_scaling
    for length in (32, 64):
        recipe = yaml.safe_load(recipe_files(LAYOUT)[f"stage3_ctx{length}k_{LAYOUT}.yaml"])
        assert {stage.name: stage.train.train_tokens for stage in best.stages}[f"{length}k"] == recipe["train_tokens"]
    for stage, same in zip(best.stages, ours.stages, strict=True):
        assert stage.train.distil == same.train.distil
        assert stage.train.train_tokens == same.train.train_tokens
    assert {recall_by_stage(cell)[0] for cell in others} == {(0.2, 1.0)}


SPECIFICATIONS = (*sorted(EXAMPLES.glob("ablations/*.yaml")), ROOT / "benchmarks" / "ablations_135m.yaml")


@pytest.mark.parametrize("file", SPECIFICATIONS, ids=lambda file: file.stem)
def test_ablations_are_specifications(file, tmp_path, monkeypatch):
    """Every cell's settings are accepted; each is told from the others in the report."""
    monkeypatch.chdir(tmp_path)
    selections(tmp_path / "runs" / "result")
    if file.stem == "base":
        (tmp_path / "own.yaml").write_text(yaml.safe_dump({"base": str(file), "output": "own", "grid": {"train.seed": [1]}}))
        file = tmp_path / "own.yaml"
    cells = read_sweep(file).cells
    assert len({str(cell.varied.get("label", cell.varied)) for cell in cells}) == len(cells)
    for cell in cells:
        assert "mixers" in row_of(cell) and all(stage.measurements for stage in cell.stages)
        names = [stage.name for stage in cell.stages]
        assert names == [name for name in ("align", "2k", "8k", "32k", "64k", "start") if name in names]
    if file.stem == "ablations_135m":
        assert len(cells) == 32 and {len(cell.stages) for cell in cells} == {1, 2}
        assert {sum(stage.train.train_tokens for stage in cell.stages) for cell in cells[1:26]} == {2_000_000}
    if file.stem == "loss":
        weights = [cell.last.train.distil for cell in cells]
        assert [(w.kl_weight, w.ce_weight) for w in weights] == [(1.0, 0.0), (1.0, 0.2), (1.0, 1.0), (0.0, 1.0)]
        assert {cell.last.train.recall.answer_weight for cell in cells} == {1.0}
    if file.stem == "stages":
        assert {sum(stage.train.train_tokens for stage in cell.stages) for cell in cells} == {16_600_000}
        assert {stage.train.distil.ce_weight for cell in cells for stage in cell.stages} == {1.0}
    if file.stem == "others":
        windows = [row_of(cell)["kv_percent"] for cell in cells if "window" in cell.varied["label"]]
        assert len(windows) == 3 and all(11.0 <= percent <= 11.2 for percent in windows)
    if file.stem == "rank":
        assert all(1270 <= row_of(cell)["kv_bytes_per_token"] / 2 <= 1290 for cell in cells)


def test_the_whole_chain_runs_on_tiny_models(one_rank, tmp_path, tokenizer, capsys, request):  # noqa: F811
    """Every command of the script is run in this process, on a random Llama of 4 layers, a few steps a stage.

    Sequences of the last stage are longer than the teacher's window, so it reads overlapping windows.
    """
    calls, answers, folder = tmp_path / "calls", tmp_path / "answers", tmp_path / "model"
    model = tiny_hf_model("llama", num_hidden_layers=4, vocab_size=len(tokenizer), max_position_embeddings=768)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generator = random.Random(0)
    for name in ("library", "unseen"):
        (tmp_path / name).mkdir()
        for number in range(60):
            words = ("".join(generator.choices(string.ascii_letters + ".,", k=generator.randint(1, 9))) for _ in range(200))
            (tmp_path / name / f"{number}.txt").write_text(" ".join(words))
    for fifo in (calls, answers):
        os.mkfifo(fifo)
    program(tmp_path, "hylo", f'printf \'%s\\0\' "$@" >{calls}; read -r code answer <{answers}; echo "$answer"; exit $code')
    program(tmp_path, "nvidia-smi", "exit 9")
    sizes = {
        "LENGTH": "256", "GROWTH": "1 1 2 4", "CALIBRATION_TOKENS": "1024", "SELECT_TOKENS": "4096", "EVAL_LENGTHS": "768",
        "MLA_LAYERS": "1", "MORE_CELLS": "-", "TRIALS": "1", "BY": "kl",
    }  # fmt: skip
    sizes |= {f"TOKENS_{stage}": "512" for stage in ("ALIGN", "2K", "8K", "32K", "64K")}
    given = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "OUT": str(tmp_path / "out")} | sizes
    command = ["bash", "-c", f"bash {EXAMPLES}/result.sh >{tmp_path}/page; printf 'end\\0%s\\0' $? >{calls}"]
    process = subprocess.Popen(command, cwd=tmp_path, env=given, start_new_session=True)
    request.addfinalizer(lambda: process.poll() is None and os.killpg(process.pid, signal.SIGKILL))
    verbs, fetched = [], {"teacher": str(folder)}

    def run(*words: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main([*words])
        return ended.value.code or 0

    while (call := calls.read_text().split("\0")[:-1])[0] != "end":
        verbs.append(call[0])
        if call[0] == "fetch":
            answers.write_text(f"0 {fetched.get(call[1], tmp_path / call[1])}\n")
            continue
        if call[0] == "sweep" and call[1] != "report":  # cells here in place of two processes
            assert [run("sweep", call[1], "--cell", str(cell.number)) for cell in read_sweep(Path(call[1])).cells] == [0, 0]
        answers.write_text(f"{run(*call)}\n")
    assert process.wait(60) == 0 and call[1] == "0", capsys.readouterr().err
    assert verbs[:6] == ["fetch", "convert", "fetch", "preprocess", "calibrate", "fetch"]
    assert verbs[-6:] == ["select", "select", "select", "sweep", "sweep", "export"]
    teacher, hybrid = read_sweep(tmp_path / "out" / "result.yaml").cells
    assert hybrid.state() == teacher.state() == ("finished", "")
    last = hybrid.last.train
    assert last is not None and (last.teacher_window.mode, last.sequence_length) == ("windows", 1024)
    page, results = (tmp_path / "page").read_text(), SimpleNamespace(**row_of(hybrid))
    assert results.tokens >= 4 * 512
    recorded = [json.loads((stage.run / "config.json").read_text())["distil"] for stage in hybrid.stages]
    assert [loss["ce_weight"] for loss in recorded] == [0.0, 1.0, 1.0, 1.0]
    for title in ("recall, passkey, exact", "ppl, by_position, perplexity"):
        assert f"## text: {title}" in page
    card = ModelCard.load(next((tmp_path / "out" / "sweep" / "exports").glob("*/README.md")))
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and card.data.eval_results
    stages = [line for line in card.text.splitlines() if line.startswith(("| align |", "| distil |"))]
    assert ["distil.ce_weight 1.0" in line for line in stages] == [False, True, True, True]
    assert "distil.ce_weight: cross-entropy on the text itself" in card.text
