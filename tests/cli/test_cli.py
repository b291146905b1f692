"""The command line as a user meets it: the chain convert, verify, upcycle, assemble, export, and every refusal."""

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from docstring_parser import parse as parse_docstring
from safetensors.torch import load_file, save_file

from megatron_hylo import __version__
from megatron_hylo.cli.main import QUICK, VERBS, main
from megatron_hylo.cli.parser import command
from megatron_hylo.config import ParallelConfig, RopeScaling
from megatron_hylo.config.train import OptimizerSettings, TrainConfig
from megatron_hylo.config.upcycle import UpcycleConfig
from megatron_hylo.models.checkpoint import load_model
from megatron_hylo.models.description import read_description
from tests.conftest import tiny_hf_model

ROOT = Path(__file__).parents[2]


def run(capsys, *arguments: str) -> tuple[int, str]:
    """Exit code and all output of `hylo arguments...`, in this process."""
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return stopped.value.code, " ".join((captured.out + captured.err).split())


@pytest.fixture
def teacher(one_rank, tmp_path, capsys):
    """A tiny Llama as a Hugging Face folder and as a model folder."""
    tiny_hf_model("llama").save_pretrained(tmp_path / "hf")
    assert run(capsys, "convert", tmp_path / "hf", tmp_path / "teacher")[0] == 0
    return tmp_path / "teacher"


def test_verify_passes_then_names_the_changed_weight_and_exits_1(teacher, tmp_path, capsys):
    code, text = run(capsys, "verify", tmp_path / "hf", teacher)
    assert code == 0 and "tensors compared: 29, differing: 0" in text and "max |delta logit|" in text
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    code, text = run(capsys, "verify", tmp_path / "hf", teacher)
    assert code == 1 and "model.layers.2.mlp.up_proj.weight" in text and "NOT verified" in text


def test_an_empty_world_size_is_one_process(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "")
    train = "train --stage pretrain --scratch smollm2-135m --data nowhere --output run --cuda_graphs true"
    code, text = run(capsys, *train.split())
    assert code == 2 and "no dataset nowhere/train.bin" in text


def test_upcycling_directly_equals_assembling_pure_models(teacher, tmp_path, capsys):
    for name, pattern in (("mla", "+++"), ("gdn", "GGG"), ("direct", "G+G")):
        assert run(capsys, "upcycle", teacher, tmp_path / name, "--pattern", pattern, "--init", "paper")[0] == 0
    places = (tmp_path / n for n in ("mla", "gdn", "teacher", "assembled"))
    assert run(capsys, "assemble", *places, "--pattern", "G-+-G-")[0] == 0
    assert read_description(tmp_path / "assembled")[0] == read_description(tmp_path / "direct")[0]
    direct, assembled = (load_model(tmp_path / n).state_dict() for n in ("direct", "assembled"))
    assert all(torch.equal(direct[name], assembled[name]) for name in direct if isinstance(direct[name], torch.Tensor))


def test_export_and_back_keeps_every_weight(teacher, tmp_path, capsys):
    assert run(capsys, "upcycle", teacher, tmp_path / "hybrid", "--pattern", "M+G", "--init", "paper")[0] == 0
    parameters = sum(p.numel() for p in load_model(tmp_path / "hybrid").parameters())
    for verb, source, output, form in (("export", "hybrid", "exported", "hf"), ("convert", "exported", "back", "megatron")):
        with pytest.raises(SystemExit):
            main([verb, str(tmp_path / source), str(tmp_path / output), "--json"])
        about = {"format": form, "mixers": "M+G", "parameters": parameters, "verified": True}
        assert json.loads(capsys.readouterr().out) == {"output": str(tmp_path / output)} | about
    code, text = run(capsys, "verify", tmp_path / "exported", tmp_path / "hybrid")
    assert code == 0, text
    before, after = (load_model(tmp_path / n).state_dict() for n in ("hybrid", "back"))
    assert all(torch.equal(before[name], after[name]) for name in before if isinstance(before[name], torch.Tensor))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pattern", "GG"], "has 2 mixers, but the base model has 3 layers; give one for each"),
        (["--pattern", "GXG"], "holds 'X'"),
        (["--layout", "llama9"], "unknown layout 'llama9'; known: llama3.2-1b-4mla12gdn"),
        (["--layout", "llama3.2-1b-4mla12gdn"], "has hidden_size 2048, the teacher 48; upcycle a model of the sizes of"),
        (["--pattern", "G+G", "--overrides", "{kv_lora_rank: 999}"], "kv_lora_rank 999 is larger than 48"),
        (["--pattern", "G+G", "--overrides", "{rank: 9}"], "'rank' is not a field"),
        (["--pattern", "G+G", "--init", "magic"], "magic"),
        ([], "give either a layout name or a pattern"),
    ],
)
def test_bad_upcycling_ends_in_one_sentence_and_leaves_nothing(teacher, tmp_path, capsys, arguments, message):
    code, text = run(capsys, "upcycle", teacher, tmp_path / "out", *arguments)
    assert code == 2 and message in text and "Traceback" not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "teacher"]


def test_unknown_training_key_is_refused(teacher, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stage: pretrain\ndata: d\noutput: o\nmodel: m\nlearning_rat: 1.0e-4\n")
    code, text = run(capsys, "train", "--config", recipe)
    assert code == 2 and "learning_rat" in text


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_recipe_in_another_encoding_is_refused_in_a_sentence(tmp_path, capsys, encoding):
    (tmp_path / "recipe.yaml").write_text("stage: distil  # caf\u00e9\n", encoding=encoding)
    code, output = run(capsys, "train", "--config", tmp_path / "recipe.yaml")
    assert code == 2 and "the recipe (--config) is not UTF-8" in output


def test_teacher_of_another_vocabulary_is_refused(teacher, tmp_path, capsys):
    tiny_hf_model("llama", vocab_size=200).save_pretrained(tmp_path / "hf200")
    assert run(capsys, "convert", tmp_path / "hf200", tmp_path / "teacher200")[0] == 0
    from megatron_hylo.config import ConfigError
    from megatron_hylo.config.train import TrainConfig
    from megatron_hylo.train.objectives import get_objective

    settings = TrainConfig("distil", "-", "-", model="-", teacher="-", precision="fp32")
    with pytest.raises(ConfigError, match="vocabulary differs: student 160, teacher 200"):
        get_objective(settings, [load_model(tmp_path / "teacher200")]).check(load_model(teacher))


def test_existing_output_is_not_overwritten_unasked(teacher, tmp_path, capsys):
    code, text = run(capsys, "convert", tmp_path / "hf", teacher)
    assert code == 2 and "already exists" in text
    assert run(capsys, "convert", tmp_path / "hf", teacher, "--overwrite")[0] == 0


@pytest.mark.parametrize("verb", [command(v) for v in VERBS])
def test_help_explains_every_option(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert text.count("\n") > 7 and "Args:" not in text


def test_an_upcycled_model_can_be_made_again_from_its_provenance(teacher, tmp_path, capsys):
    """A YAML file gives what the command line gives; later options override it."""
    assert run(capsys, "upcycle", teacher, tmp_path / "first", "--pattern", "G+G", "--init", "paper", "--seed", "5")[0] == 0
    recipe, made = tmp_path / "recipe.yaml", read_description(tmp_path / "first")[1]["provenance"]
    provenance = {field.name: made[field.name] for field in dataclasses.fields(UpcycleConfig)}
    assert provenance == dataclasses.asdict(
        UpcycleConfig(str(teacher), str(tmp_path / "first"), pattern="G+G", init="paper", seed=5)
    )
    recipe.write_text(json.dumps(provenance))  # JSON is YAML
    code, text = run(capsys, "upcycle", "--config", recipe)
    assert code == 2 and "already exists" in text
    again = tmp_path / "again"
    recipe.write_text(json.dumps(provenance | {"output": str(again), "seed": 6}))
    assert run(capsys, "upcycle", "--config", recipe, "--seed", "5")[0] == 0
    first, second = (load_model(folder).state_dict() for folder in (tmp_path / "first", again))
    assert all(torch.equal(first[name], second[name]) for name in first if isinstance(first[name], torch.Tensor))


# a command line of each verb that does something, up to its own code
LINES = (
    "quickstart", "fetch teacher", "convert hf new", "verify hf model", "preprocess text new --tokenizer hf",
    "sample-text teacher new --tokens 9", "sweep spec.yaml",
    "calibrate teacher data new", "upcycle teacher new --pattern GG", "select teacher --mla m --linear l --data d --count 1",
    "assemble m l b new --pattern GG", "cache-teacher teacher data new", "serve-teacher teacher 29600",
    "train --stage pretrain --data d --model m --output new", "evaluate m d", "eval m", "export m new", "generate m hello",
    "generate m - --batch 8", "doctor",
)  # fmt: skip


def test_every_verb_says_what_it_does_before_it_loads_anything(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert {line.split()[0] for line in LINES} == {command(verb) for verb in VERBS if verb not in QUICK}
    for line in LINES:
        said = []
        monkeypatch.setattr("megatron_hylo.cli.main._run", lambda *_, said=said: said.append(capsys.readouterr().err))
        with pytest.raises(SystemExit):
            main(shlex.split(line))
        assert said == [f"hylo {line}\n"]


def test_the_first_line_takes_less_than_two_seconds_of_a_processor():
    """A process of its own, for what is imported on the way; verbs differ in nothing before it (the test above)."""
    program = (
        "import time\nfrom megatron_hylo.cli import main\nfrom megatron_hylo.cli.__main__ import run\n"
        "main._run = lambda *_: print(time.process_time())\nrun()"
    )
    command_line = [sys.executable, "-c", program, "evaluate", "/nowhere", "/nowhere"]
    done = subprocess.run(command_line, capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "hylo evaluate /nowhere /nowhere\n"
    assert float(done.stdout) < 2


def test_the_version_is_the_packages(capsys):
    code, text = run(capsys, "--version")
    assert code == 0 and text == f"hylo {__version__}"


def test_layouts_json_is_an_array_of_four_fields(capsys):
    with pytest.raises(SystemExit):
        main(["layouts", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) >= 12 and set(rows[0]) == {"name", "params", "kv_percent", "kv_bytes_per_token"}


@pytest.mark.parametrize("settings", [TrainConfig, UpcycleConfig, OptimizerSettings, ParallelConfig, RopeScaling])
def test_help_explains_every_setting_of_training(settings):
    explained = {p.arg_name: p.description for p in parse_docstring(settings.__doc__).params}
    assert explained.keys() == {field.name for field in dataclasses.fields(settings)}
    assert all(explained.values())
