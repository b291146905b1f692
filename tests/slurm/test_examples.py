"""The example of growing lengths runs commands that are accepted, on a CPU and on a GPU, and goes on where it was."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_hylo.cli.main import VERBS
from megatron_hylo.cli.parser import build_parser
from megatron_hylo.config.recipes import recipe_files

SCRIPT = Path(__file__).parents[2] / "examples" / "smollm2" / "long.sh"
LAYOUT = "smollm2-135m-8mla22gdn-teacher"
STAGES = ("2k", "8k", "32k", "64k")


@pytest.fixture(scope="module")
def parser():
    return build_parser(VERBS)


def run(folder: Path, gpu: bool, *stages: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
    """Run the script with a `hylo` that makes folders and notes how it was called; returns also the calls."""
    fakes = {
        "hylo": """
            printf '%s\\0' "$@" >>"$RECORD"; printf '\\n' >>"$RECORD"
            case "$1" in fetch) echo a; exit ;; evaluate | report | compare) echo "{}"; exit ;; esac
            made="$3"
            [[ "$1" != calibrate ]] || made="$4"
            words=("$@")
            for i in "${!words[@]}"; do [[ "${words[i]}" != --output ]] || made="${words[i + 1]}"; done
            [[ "$1" != train ]] || made+=/model
            mkdir -p "$made" """,
        "nvidia-smi": 'echo "GPU 0: made"' if gpu else "exit 9",
    }
    for name, body in fakes.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "record").write_text("")
    recipes = folder / "out" / "recipes" / "megatron_hylo" / "recipes"
    recipes.mkdir(parents=True, exist_ok=True)
    for name, text in recipe_files(LAYOUT).items():
        (recipes / name).write_text(text)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "RECORD": str(folder / "record"), "OUT": str(folder / "out")}
    done = subprocess.run(["bash", str(SCRIPT), *stages], cwd=folder, env=environment, capture_output=True, text=True)
    return done, [line.split("\0")[:-1] for line in (folder / "record").read_text().split("\n")[:-1]]


@pytest.mark.parametrize("gpu", [False, True])
def test_the_stages_are_commands_that_are_accepted(parser, tmp_path, gpu):
    done, calls = run(tmp_path, gpu)
    assert (done.returncode, "no GPU here" in done.stderr) == (0, not gpu), done.stderr
    trained = [dict(zip(call[1::2], call[2::2])) for call in calls if call[0] == "train"]
    lengths = [2048, 8192, 32768, 65536] if gpu else [256, 512, 1024, 2048]
    assert [int(words["--sequence_length"]) for words in trained] == lengths
    models = [Path(words["--model"]) for words in trained]
    assert [str(model.relative_to(tmp_path / "out")) for model in models] == [
        "hybrid",
        *(f"long_{s}/model" for s in STAGES[:3]),
    ]
    for call in calls:
        parser.parse_args(call)
    assert sum(call[0] == "evaluate" and "--teacher_window.mode" in call for call in calls) == 4
    again, calls = run(tmp_path, gpu)
    assert again.returncode == 0 and [call[0] for call in calls] == ["compare", "report"]


def test_stages_can_be_chosen(tmp_path):
    done, calls = run(tmp_path, True, "8k")
    assert done.returncode == 0 and [call[0] for call in calls].count("train") == 1, done.stderr
    assert shlex.join(next(call for call in calls if call[0] == "train")).count(f"{tmp_path}/out/hybrid") == 1
    done, calls = run(tmp_path, True, "9k")
    assert done.returncode == 2 and "there is no stage 9k; choose out of 2k 8k 32k 64k" in done.stderr and not calls
