"""Mistakes that every verb finds before it imports PyTorch, so that the sentence comes within a second."""

import json
import subprocess
import sys

import pytest

from megatron_hylo.cli.main import QUICK, VERBS
from megatron_hylo.cli.parser import command
from megatron_hylo.models.description import FORMAT, VERSION
from tests.conftest import tiny_config

TRAIN = "train --stage distil --sequence_length 16 --output run"
PRETRAIN = "train --stage pretrain --sequence_length 16 --data data"
SELECT = "select --count 1"
MISTAKES = {  # command line -> what the sentence names
    "quickstart --text nowhere": "nowhere does not exist",
    "quickstart --linear gdm": "gdm",
    "quickstart --train_tokens 0": "--train_tokens",
    "quickstart --output text/a.txt": "text/a.txt is a file",
    "quickstart --output other": "other/hybrid is another model than smollm2-135m-8mla22gdn-teacher, calibrated",
    "fetch teachr": "teachr",
    "convert nowhere out": "nowhere does not exist",
    "convert some-name/on-the-hub out": "hf download",
    "convert data out": "no config.json",
    "convert hf model": "model already exists",
    "convert nowhere out --to hf": "nowhere is not a megatron_hylo model folder",
    "convert hf out --to gguf": "gguf",
    "verify nowhere model": "nowhere does not exist",
    "verify hf nowhere": "nowhere is not a megatron_hylo model folder",
    "preprocess nowhere out --tokenizer hf": "nowhere does not exist",
    "preprocess text out --tokenizer nowhere": "nowhere holds no tokenizer",
    "preprocess text data --tokenizer hf": "data already exists",
    "sample-text nowhere out --tokens 9": "nowhere does not exist",
    "sample-text model data --tokens 9": "data already exists",
    "sample-text model out --tokens 9 --starts nowhere": "no dataset nowhere/train.bin",
    "calibrate nowhere data out": "nowhere is not a megatron_hylo model folder",
    "calibrate hf data out": "once `hylo convert` has read it",
    "calibrate model nowhere out": "no dataset nowhere/train.bin",
    "calibrate model data hf": "hf already exists",
    "upcycle nowhere out --pattern G+-": "nowhere is not a megatron_hylo model folder",
    "upcycle model data --pattern G+ --init paper": "data already exists",
    "upcycle model out --layout llama --init paper": "unknown layout 'llama'",
    "upcycle model out --pattern GX --init paper": "'X'",
    "upcycle model out --pattern GG": "needs --calibration",
    "upcycle model out --pattern GG --calibration nowhere": "nowhere is not a calibration folder",
    "upcycle --config recipe.yaml": "unknown key layuot",
    f"{SELECT} nowhere --mla model --linear model --data data": "nowhere is not a megatron_hylo model folder",
    f"{SELECT} model --mla model --linear model --data nowhere": "no dataset nowhere/train.bin",
    f"{SELECT} model --mla model --linear model --data data --output data": "data already exists",
    "assemble model nowhere model out --pattern G+": "nowhere is not a megatron_hylo model folder",
    "assemble model model model data --pattern G+": "data already exists",
    "cache-teacher nowhere data out": "nowhere is not a megatron_hylo model folder",
    "cache-teacher model nowhere out": "no dataset nowhere/train.bin",
    "cache-teacher model data hf": "hf already exists",
    "serve-teacher nowhere 29600": "nowhere is not a megatron_hylo model folder",
    "serve-teacher model host:port": "must be HOST:PORT",
    "sweep nowhere.yaml": "nowhere.yaml",
    f"{TRAIN} --config recipe.yaml": "unknown key layuot",
    f"{TRAIN} --model nowhere --teacher model --data data": "nowhere is not a megatron_hylo model folder",
    f"{TRAIN} --model model --teacher hf:nowhere --data data": "downloads nothing",
    f"{TRAIN} --model model --teacher model --data nowhere": "no dataset nowhere/train.bin",
    f"{PRETRAIN} --output run --scratch llama": "scratch 'llama'",
    f"{PRETRAIN} --output text/a.txt --scratch model": "text/a.txt",
    "evaluate nowhere data": "nowhere is not a megatron_hylo model folder",
    "evaluate model nowhere": "no dataset nowhere/heldout.bin",
    "evaluate model data --teacher nowhere": "nowhere is not a megatron_hylo model folder",
    "eval nowhere --suite ppl --data data": "nowhere does not exist",
    "eval model --suite pll": "pll",
    "eval model --suite ppl --data nowhere": "no dataset nowhere/heldout.bin",
    "eval model --suite ppl --data data --output hf": "hf already exists",
    "export nowhere out": "nowhere is not a megatron_hylo model folder",
    "export model hf": "hf already exists",
    "export model out --results [nowhere]": "nowhere is no results folder",
    "export model out --quantize int8 --calibration_data nowhere": "no dataset nowhere/train.bin",
    "generate nowhere hello": "nowhere does not exist",
    "generate model hello --temperature -1": "temperature",
    "generate model hello --batch 2": "line 1 of the prompts is not JSON",
    "doctor --layout llama": "unknown layout 'llama'",
    "HYLO_KERNELS=gated_delta=torch doctor": "HYLO_KERNELS: unknown operation 'gated_delta'",
    "HYLO_KERNELS=ssd=fast generate model hello": "HYLO_KERNELS: ssd has no implementation 'fast'",
}
DESCRIPTION = json.dumps(
    {"format": FORMAT, "version": VERSION, "model": tiny_config("*-*-").to_dict(), "params_dtype": "float32", "provenance": {}}
)
PROGRAM = """
import contextlib, io, json, os, sys
from megatron_hylo.cli import console, main

for line in json.load(sys.stdin):
    words = line.split(" ")
    os.environ["HYLO_KERNELS"] = words.pop(0).removeprefix("HYLO_KERNELS=") if line.startswith("HYLO_KERNELS") else ""
    console.console.file = said = io.StringIO()
    code = None
    with contextlib.redirect_stderr(said):
        try:
            main.main(words)
        except SystemExit as end:
            code = end.code
    slow = [name for name in ("torch", "transformers", "megatron.core", "fla") if name in sys.modules]
    print(json.dumps([line, code, said.getvalue(), slow]), flush=True)
    if slow:  # they would be charged to all that come after it
        break
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Line -> (exit code, sentence, slow libraries that are imported), of one process for all lines."""
    root = tmp_path_factory.mktemp("mistakes")
    files = {
        "model/hylo.json": DESCRIPTION, "hf/config.json": "{}", "hf/tokenizer.json": "{}", "text/a.txt": "a text",
        "recipe.yaml": "layuot: llama3.2-1b-4mla12gdn\n",
        "other/hybrid/hylo.json": DESCRIPTION, "other/hybrid/manifest.json": json.dumps({"files": {}}),
        **{f"data/{split}.{suffix}": "" for split in ("train", "heldout") for suffix in ("bin", "idx")},
    }  # fmt: skip
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    before = sorted(root.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(list(MISTAKES)), cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert sorted(root.rglob("*")) == before, "nothing is written"
    return {line: rest for line, *rest in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_answered_before_torch_is_imported(line, answers):
    if line not in answers:
        pytest.skip("a line before imports slow libraries")
    code, sentence, slow = answers[line]
    assert code == 2 and MISTAKES[line] in " ".join(sentence.split()), sentence
    assert not slow, f"{sentence} came after the import of {slow}"


def test_every_verb_has_a_mistake_here():
    """Verbs of `QUICK` never import PyTorch for a mistake; they have tests of their own."""
    tried = {word for line in MISTAKES for word in line.split()[:2]}
    assert {command(verb) for verb in VERBS if verb not in QUICK} <= tried


DRY_RUN = """
import sys

class Import:
    def find_spec(self, name, *_):
        if name == "torch":
            print("PyTorch is imported", file=sys.stderr, flush=True)

sys.meta_path.insert(0, Import())
from megatron_hylo.cli import main
main.main(sys.argv[1:])
"""


@pytest.mark.parametrize("wrong", ["--model nowhere --data data", "--model model --data nowhere"])
def test_a_dry_run_says_what_is_missing_before_torch_is_imported(wrong, tmp_path):
    """All checks come after it, as without a mistake."""
    files = {"model/hylo.json": DESCRIPTION, "data/train.bin": "", "data/train.idx": ""}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    line = f"{TRAIN} --teacher model {wrong} --dry_run"
    done = subprocess.run([sys.executable, "-c", DRY_RUN, *line.split()], cwd=tmp_path, capture_output=True, text=True)
    before, said, _ = done.stderr.partition("PyTorch is imported")
    assert said and "nowhere" in before.split(line)[-1].replace("\n", "")
    assert done.returncode == 2 and "nowhere" in done.stdout and "the run would not start" in done.stdout
