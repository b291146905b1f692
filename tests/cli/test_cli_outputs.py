"""Outputs as a user names them: what is in the way is said at once, `~` is the home folder, modes are the umask's."""

import json
import os
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from megatron_hylo.cli.main import VERBS
from megatron_hylo.cli.parser import parameters, settings_of
from megatron_hylo.config import train, upcycle
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.config.upcycle import UpcycleConfig
from megatron_hylo.io import atomic_directory, verify_manifest
from tests.cli.test_cli import run
from tests.conftest import tiny_hf_model
from tests.data.conftest import make_documents, tokenizer  # noqa: F401  the fixture
from tests.io.conftest import another_process, make  # noqa: F401  the fixture

# every verb that makes a folder, for the output RUN/model (quickstart makes others): SOURCE must not even be there
COMMANDS = {
    "convert": "SOURCE OUTPUT --overwrite",
    "export": "SOURCE OUTPUT --overwrite",
    "preprocess": "SOURCE OUTPUT --tokenizer SOURCE --overwrite",
    "sample-text": "SOURCE OUTPUT --tokens 9 --overwrite",
    "calibrate": "SOURCE SOURCE OUTPUT --overwrite",
    "cache-teacher": "SOURCE SOURCE OUTPUT --overwrite",
    "upcycle": "SOURCE OUTPUT --pattern G --overwrite",
    "assemble": "SOURCE SOURCE SOURCE OUTPUT --pattern G --overwrite",
    "select": "SOURCE --mla SOURCE --linear SOURCE --data SOURCE --count 1 --output OUTPUT --overwrite",
    "eval": "SOURCE --suite gsm8k --output OUTPUT --overwrite",
    "train": "--stage pretrain --data SOURCE --model SOURCE --output RUN",
}


def start(capsys, verb: str, source: Path, output: Path) -> tuple[int, str]:
    """Exit code and all output of a verb."""
    words = {"SOURCE": source, "OUTPUT": output, "RUN": output.parent}
    return run(capsys, verb, *(words.get(word, word) for word in COMMANDS[verb].split()))


def test_these_are_all_verbs_that_make_a_folder():
    makes = [v for v in VERBS if "output" in parameters(v)]
    assert {v.__name__.replace("_", "-") for v in makes} == COMMANDS.keys() | {"quickstart", "report", "compare"}


@pytest.mark.parametrize("verb", COMMANDS)
def test_no_verb_replaces_what_is_not_ours_or_what_it_reads(one_rank, tmp_path, capsys, verb):
    output = tmp_path / "run" / "model"
    output.mkdir(parents=True)
    (output / "thesis.tex").write_text("years of work")
    code, text = start(capsys, verb, tmp_path / "nowhere", output)
    assert code == 2 and "model was not made by megatron_hylo" in text and (output / "thesis.tex").is_file(), text
    with atomic_directory(tmp_path / "made") as folder:
        (folder / "weights").write_text("weights")
    shutil.rmtree(output)
    if verb == "train":  # it removes old checkpoints; a finished RUN/model is not made again
        os.rename(tmp_path / "made", tmp_path / "run" / "checkpoints")
        code, text = start(capsys, verb, tmp_path / "run" / "checkpoints", output)
        assert code == 2 and "run/checkpoints is what is read" in text
        verify_manifest(tmp_path / "run" / "checkpoints")
    else:
        os.rename(tmp_path / "made", output)
        code, text = start(capsys, verb, output, output)
        assert code == 2 and "model is what is read" in text, text
        verify_manifest(output)
    assert not list(tmp_path.rglob("*.lock")) + list(tmp_path.rglob(".*.partial")) and "Traceback" not in text


def test_quickstart_refuses_before_hours_of_work(tmp_path, capsys):
    (tmp_path / "run" / "export").mkdir(parents=True)
    code, text = run(capsys, "quickstart", "--output", tmp_path / "run")
    assert code == 2 and "run/export already exists" in text and [p.name for p in (tmp_path / "run").iterdir()] == ["export"]
    (tmp_path / "file").write_text("")
    code, text = run(capsys, "quickstart", "--output", tmp_path / "file")
    assert code == 2 and "file is a file" in text


def test_a_second_process_is_refused_by_every_verb(one_rank, tmp_path, capsys, another_process):  # noqa: F811
    output = tmp_path / "run" / "model"
    process = another_process(output, tmp_path / "run")
    for verb in COMMANDS:
        code, text = start(capsys, verb, tmp_path / "nowhere", output)
        assert code == 2 and f"is being written by process {process.pid}" in text, text
    code, text = run(capsys, "quickstart", "--output", tmp_path / "run")
    assert code == 2 and f"is being written by process {process.pid}" in text


def test_errors_of_the_operating_system_are_sentences(one_rank, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for path, words in (
        (tmp_path / "file" / "a", "file is a file, so"),
        (tmp_path / ("n" * 300), "choose a shorter name"),
        (tmp_path / "file" / "[red]", "/file/[red] cannot be made"),
        (Path("/proc/nowhere/a"), "/proc/nowhere: no such file or directory; look at the path"),
    ):
        code, text = run(capsys, "convert", tmp_path, path)
        assert code == 2 and words in text and "Traceback" not in text, text


def test_a_damaged_export_is_refused_by_all_that_read_it(one_rank, tmp_path, capsys, tokenizer):  # noqa: F811
    tiny_hf_model("llama", vocab_size=304).save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    assert run(capsys, "convert", tmp_path / "hf", tmp_path / "model")[0] == 0
    assert run(capsys, "export", tmp_path / "model", tmp_path / "export")[0] == 0
    verbs = {
        "convert": [tmp_path / "export", tmp_path / "again"],
        "verify": [tmp_path / "export", tmp_path / "model"],
        "generate": [tmp_path / "export", "the state", "--max_new_tokens", "2"],
        "preprocess": [tmp_path / "some.txt", tmp_path / "data", "--tokenizer", tmp_path / "export"],
    }
    (tmp_path / "some.txt").write_text("the state")
    file = tmp_path / "export" / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    for verb, arguments in verbs.items():
        code, text = run(capsys, verb, *arguments)
        assert code == 2 and f"{file} does not have the sha256 of its manifest" in text, text
    (tmp_path / "export" / "manifest.json").unlink()  # as the message says, where it was changed on purpose
    assert run(capsys, "generate", *verbs["generate"])[0] == 0


NOT_PATHS = {  # parameters of verbs that are text, or a name in whose place a path may stand (hylo plan)
    "address", "base_model", "batch_size", "gpu", "init", "keep_best", "key", "layout", "license", "pattern", "prompt",
    "recipe", "stage", "student", "suite", "teacher",
}  # fmt: skip


def test_every_parameter_that_is_text_is_known_to_be_no_path():
    paths = {TrainConfig: train.PATHS, UpcycleConfig: upcycle.PATHS}
    text = {
        p.name
        for v in VERBS
        for p in parameters(v).values()
        if p.annotation in (str, str | None) and p.name not in paths.get((settings_of(v) or (None, None))[1], ())
    }
    groups = [f.type for f in fields(TrainConfig) if is_dataclass(f.type)]
    text |= {f.name for group in groups for f in fields(group) if f.type in (str, str | None)}
    assert text == NOT_PATHS | {"teacher_address", "wandb_project"}


def test_a_tilde_is_the_home_folder_on_the_command_line_and_in_recipes(one_rank, tmp_path, capsys, monkeypatch, tokenizer):  # noqa: F811
    """The shell expands it at the start of a word alone: not after `=`, not in YAML."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    tiny_hf_model("llama", vocab_size=304).save_pretrained(tmp_path / "home" / "hf")
    tokenizer.save_pretrained(tmp_path / "home" / "hf")
    (tmp_path / "home" / "text.jsonl").write_text("\n".join(json.dumps({"text": d.text}) for d in make_documents(30)))
    former = os.umask(0o027)
    try:
        assert run(capsys, "convert", "~/hf", "~/model")[0] == 0
        assert run(capsys, "preprocess", "~/text.jsonl", "~/data", "--tokenizer=~/model")[0] == 0
        assert run(capsys, "export", "~/model", "~/export")[0] == 0
        recipe = tmp_path / "home" / "recipe.yaml"
        recipe.write_text(
            "{stage: pretrain, data: ~/data, model: ~/model, precision: fp32, sequence_length: 16, global_batch_size: 1, "
            "train_tokens: 32, eval_windows: 1, checkpoint: {save_interval: 1}, logging: {tensorboard: false}}"
        )
        code, text = run(capsys, "train", "--config=~/recipe.yaml", "--output=~/run")
        assert code == 0, text
    finally:
        os.umask(former)
    assert [p.name for p in tmp_path.iterdir()] == ["home"]
    folders = [tmp_path / "home" / name for name in ("model", "data", "export", "run")]
    made = [p for folder in folders for p in (folder, *folder.rglob("*"))]
    assert {(oct(p.stat().st_mode & 0o777), p.is_dir()) for p in made} == {("0o750", True), ("0o640", False)}
    code, text = run(capsys, "convert", "~nobody-of-that-name/hf", "~/other")
    assert code == 2 and "there is no such home folder" in text
    code, text = run(capsys, "train", "--config", recipe, "--output=~nobody-of-that-name/run")
    assert code == 2 and "there is no such home folder" in text
