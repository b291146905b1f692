"""Every verb that puts two things with tokens together refuses different tokenizers, before any work, and ids too large."""

import json
import shutil
from types import SimpleNamespace

import pytest

from megatron_hylo.cli.main import main
from megatron_hylo.config import ConfigError
from megatron_hylo.convert.to_megatron import convert_hf_to_megatron
from megatron_hylo.data.preprocess import build_dataset
from megatron_hylo.models.checkpoint import save_model
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.teachers.store import TeacherStore
from tests.calibrate.conftest import make_text
from tests.calibrate.tiny import random_teacher
from tests.cli.test_cli import run
from tests.conftest import tiny_config, tiny_hf_model
from tests.data.conftest import tokenizer  # noqa: F401  the fixture


@pytest.fixture(scope="module")
def material(one_rank, tmp_path_factory, tokenizer) -> SimpleNamespace:  # noqa: F811
    """Datasets, a teacher and pure students of one tokenizer, and the same of another, two of whose tokens are swapped."""
    root = tmp_path_factory.mktemp("verbs")
    tokenizer.save_pretrained(root / "ours")
    text = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = text["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    tokenizer.save_pretrained(root / "theirs")
    (root / "theirs" / "tokenizer.json").write_text(json.dumps(text))
    build_dataset(make_text(30), tokenizer, root / "data", heldout_fraction=0.2)
    for name, pattern in (("teacher", "*-*-*-"), ("mla", "+-+-+-"), ("linear", "G-G-G-")):
        config = tiny_config(pattern, vocab_size=304)
        model = random_teacher(config, 1) if name == "teacher" else build_model(config)
        for kind in ("ours", "theirs"):
            save_model(model, root / f"{name}_{kind}", root / kind, {"stage": "align"})
    save_model(build_model(tiny_config("*-*-*-", vocab_size=160)), root / "small")
    return SimpleNamespace(root=root, data=root / "data")


COMMANDS = {
    "evaluate": "evaluate teacher_theirs data --sequence_length 16",
    "evaluate with a teacher": "evaluate teacher_ours data --teacher teacher_theirs --sequence_length 16",
    "calibrate": "calibrate teacher_theirs data OUT --tokens 960 --sequence_length 40",
    "cache-teacher": "cache-teacher teacher_theirs data OUT",
    "select": "select teacher_ours --mla mla_ours --linear linear_theirs --data data --count 1 --tokens 64 "
    "--sequence_length 16",
    "assemble": "assemble mla_ours linear_theirs teacher_ours OUT --pattern G+G",
    "assemble on a base": "assemble mla_ours linear_ours teacher_theirs OUT --pattern G+G",
    "train": "train --stage pretrain --model teacher_theirs --data data --output OUT --precision fp32 --sequence_length 16",
    "train with a teacher": "train --stage distil --model mla_ours --teacher teacher_theirs --data data --output OUT "
    "--precision fp32 --sequence_length 16",
    "train two": "train --stage align --model mla_ours --second_model linear_theirs --teacher teacher_ours --data data "
    "--output OUT --precision fp32 --sequence_length 16",
}


@pytest.mark.parametrize("verb", COMMANDS)
def test_another_tokenizer_is_refused_by_its_first_token(material, tmp_path, capsys, monkeypatch, verb):
    monkeypatch.chdir(material.root)
    code, text = run(capsys, *(str(tmp_path / "out") if word == "OUT" else word for word in COMMANDS[verb].split()))
    assert code == 2 and "tokenizer" in text and "is 'e' in" in text and "and 't' in" in text, text
    assert not list(tmp_path.glob("**/*.json"))


@pytest.mark.parametrize("verb", ["evaluate", "calibrate", "cache-teacher", "train"])
def test_an_id_beyond_the_vocabulary_is_a_sentence(material, tmp_path, capsys, monkeypatch, verb):
    monkeypatch.chdir(material.root)
    words = (COMMANDS[verb].replace("teacher_theirs", "small")).split()
    code, text = run(capsys, *(str(tmp_path / "out") if word == "OUT" else word for word in words))
    assert code == 2 and "the vocabulary of small has 160 (0 to 159)" in text and "Traceback" not in text, text


def test_a_calibration_of_another_tokenizer_is_refused(material, tmp_path, capsys):
    words = ["calibrate", material.root / "teacher_ours", material.data, tmp_path / "calibration", "--tokens", 960]
    with pytest.raises(SystemExit):
        main([str(word) for word in [*words, "--sequence_length", 40, "--json"]])
    made = json.loads(capsys.readouterr().out)
    assert (made["output"], made["tokens"], made["layers"]) == (str(tmp_path / "calibration"), 960, 3)
    arguments = [tmp_path / "out", "--pattern", "G+G", "--calibration", tmp_path / "calibration"]
    code, text = run(capsys, "upcycle", material.root / "teacher_theirs", *arguments)
    assert code == 2 and "calibration was made with another tokenizer" in text, text


def test_a_store_of_another_tokenizer_is_refused(material, tmp_path, capsys):
    """The same token ids, which mean other tokens."""
    store, other = tmp_path / "store", tmp_path / "data"
    arguments = ["--sequence_length", "64", "--precision", "fp32"]
    code, text = run(capsys, "cache-teacher", material.root / "teacher_ours", material.data, store, *arguments)
    assert code == 0, text
    TeacherStore(store, material.data, material.root / "teacher_ours")
    shutil.copytree(material.data, other)
    shutil.copytree(material.root / "theirs", other / "tokenizer", dirs_exist_ok=True)
    with pytest.raises(ConfigError, match="data was made with another tokenizer than that of .*store: id"):
        TeacherStore(store, other)


def test_verify_compares_the_tokenizer(material, tmp_path, capsys):
    tiny_hf_model("llama", vocab_size=304).save_pretrained(tmp_path / "hf")
    for file in (material.root / "ours").iterdir():
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    convert_hf_to_megatron(tmp_path / "hf", tmp_path / "converted")
    code, text = run(capsys, "verify", tmp_path / "hf", tmp_path / "converted")
    assert code == 0 and "tokenizer: no difference" in text
    for file in (material.root / "theirs").iterdir():
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    code, text = run(capsys, "verify", tmp_path / "hf", tmp_path / "converted")
    assert code == 1 and "tokenizer: id" in text and "NOT verified" in text
    convert_hf_to_megatron(tmp_path / "hf", tmp_path / "theirs")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    convert_hf_to_megatron(tmp_path / "hf", tmp_path / "none")
    (tmp_path / "hf" / "tokenizer.json").write_bytes((material.root / "ours" / "tokenizer.json").read_bytes())
    code, text = run(capsys, "verify", tmp_path / "hf", tmp_path / "none")
    assert code == 1 and "none has no tokenizer" in text


@pytest.mark.parametrize("form", ["megatron", "hf"])
def test_a_prompt_with_a_token_beyond_the_embedding_is_a_sentence(material, tmp_path, capsys, tokenizer, form):  # noqa: F811
    larger = type(tokenizer).from_pretrained(material.root / "ours")
    larger.add_tokens(["linear layer", "<extra>"])
    folder = tmp_path / "model"
    if form == "hf":
        tiny_hf_model("llama", vocab_size=301).save_pretrained(folder)
        larger.save_pretrained(folder)
    else:
        larger.save_pretrained(tmp_path / "tokenizer")
        save_model(build_model(tiny_config("G-+-", vocab_size=301)), folder, tmp_path / "tokenizer")
    code, text = run(capsys, "generate", folder, "a <extra> state", "--max_new_tokens", "2")
    assert code == 2 and "the prompt holds '<extra>', id 301" in text and "has 301 (0 to 300)" in text, text
    assert run(capsys, "generate", folder, "a linear layer", "--max_new_tokens", "2")[0] == 0
