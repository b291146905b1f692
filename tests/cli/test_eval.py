"""`hylo eval` from the command line to its results folder, on a tiny model of every stage and on what it must refuse."""

import errno
import json
import math
import os
import random
import shutil
from types import SimpleNamespace

import pytest
import torch

from megatron_hylo.cli import main as cli
from megatron_hylo.config import ConfigError
from megatron_hylo.config.evaluation import SUITES, SuiteSettings
from megatron_hylo.config.layouts import kv_percent, parameter_count
from megatron_hylo.data.heldout import heldout_documents
from megatron_hylo.data.preprocess import preprocess
from megatron_hylo.eval import recall, suites_ppl
from megatron_hylo.eval.folders import evaluate_folder
from megatron_hylo.eval.lm_facts import foreign_results, parts_key
from megatron_hylo.eval.results import mean_by_group, read_results
from megatron_hylo.eval.suites import run_suites
from megatron_hylo.io.identity import content_identity
from tests.hf.conftest import serve_config

CONFIG = serve_config("G+M*", max_position_embeddings=256)


@pytest.fixture(scope="module")
def place(save_hybrid, tmp_path_factory):
    """Folder with `model`, its export `hf`, and `data` of letters."""
    folder = tmp_path_factory.mktemp("eval")
    torch.manual_seed(0)
    save_hybrid(folder, CONFIG)
    (folder / "text").mkdir()
    generator = random.Random(0)
    for number in range(8):
        words = ("".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(200))
        (folder / "text" / f"{number}.txt").write_text(" ".join(words))
    preprocess(folder / "text", folder / "data", folder / "tokenizer", 0.5)
    return folder


def run(place, *words: object) -> int:
    with pytest.raises(SystemExit) as exit:
        cli.main(["eval", *(str(place / word) if word in ("model", "hf") else str(word) for word in words)])
    return int(exit.value.code or 0)


def test_results_of_a_model_and_of_its_export_are_those_of_evaluate(place, capsys):
    options = ["--suite", "ppl", "--data", place / "data", "--sequence_length", 64, "--lengths", "[128,200]", "--limit", 5]
    assert run(place, "model", *options, "--output", place / "a") == 0
    shown = capsys.readouterr().out
    assert run(place, "hf", *options, "--output", place / "b") == 0
    one, other = read_results(place / "a"), read_results(place / "b")
    assert [(s.task, s.length) for s in one.scores] == [("heldout", 64), ("by_position", 128), ("by_position", 200)]
    assert [s.value for s in one.scores] == pytest.approx([s.value for s in other.scores], rel=1e-5)
    quality = evaluate_folder(place / "model", place / "data", sequence_length=64, windows=5)
    assert one.scores[0].value == pytest.approx(quality.perplexity, rel=1e-5)
    documents = heldout_documents(place / "data" / "heldout", 64, 5)  # windows of one are alike
    error = mean_by_group([math.log(s.score) for s in one.samples if s.task == "heldout"], documents)[1]
    assert len(set(documents)) < 5 and one.scores[0].stderr == pytest.approx(quality.perplexity * error, rel=1e-5)
    assert (one.model["kind"], other.model["kind"]) == ("model folder", "exported model")
    assert one.model["parameters"] == other.model["parameters"] == parameter_count(CONFIG)
    assert one.model["kv_percent"] == other.model["kv_percent"] == kv_percent(CONFIG)
    assert len(one.model["hash"]) == len(other.model["hash"]) == 64 and one.run["settings"]["limit"] == 5
    assert len(one.samples) == 5 + 2 * len({s.example.split("/")[-1] for s in one.samples if s.task == "by_position"})
    assert "by_position" in shown and "model folder" in shown


def test_results_of_another_model_are_not_passed_over_in_a_card(place, tmp_path, capsys):
    """The model's own, its export's as seen from there, and another one's."""
    options = ["--suite", "ppl", "--data", place / "data", "--sequence_length", 64, "--lengths", "[128]", "--limit", 2]
    assert run(place, "model", *options, "--output", tmp_path / "a") == 0
    found = {tmp_path / "a": read_results(tmp_path / "a")}
    assert foreign_results(found, place / "model") == foreign_results(found, place / "hf") == []
    changed = json.loads((tmp_path / "a" / "results.json").read_text())
    changed["model"] |= {"hash": "0" * 64, "path": "/other"}
    (tmp_path / "a" / "results.json").write_text(json.dumps(changed))
    (tmp_path / "a" / "manifest.json").unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        words = ["export", place / "model", tmp_path / "hf", "--results", f"[{tmp_path / 'a'}]", "--no_verify"]
        cli.main([str(word) for word in words])
    assert (
        f"{tmp_path / 'a'} was measured on /other, whose weights are not those of {place / 'model'}" in capsys.readouterr().err
    )
    assert "| ppl | heldout | data | perplexity |" in (tmp_path / "hf" / "README.md").read_text()


def test_smoke_is_every_suite_on_little(place, monkeypatch):
    """Options that are given come before its own."""
    asked = []

    def measure(model, settings, *rest):
        asked.append(settings)
        raise SystemExit(0)

    monkeypatch.setattr("megatron_hylo.cli.evaluation.measure", measure)
    for more in ([], ["--limit", 5, "--sequence_length", 64]):
        assert run(place, "hf", "--suite", "smoke", "--data", place / "data", *more) == 0
    assert [(s.suites, s.limit, s.lengths, s.sequence_length) for s in asked] == [
        (list(SUITES), 1, [1024], 1024),
        (list(SUITES), 5, [1024], 64),
    ]


def test_a_seed_decides_texts_and_lengths_are_those_that_documents_have(place, tmp_path):
    """Other recall and other documents end to end, the same held-out windows; without lengths none longer than a document."""
    options = ["--data", place / "data", "--sequence_length", 64, "--limit", 1]
    read = []
    for seed in (0, 1):
        more = ["--suite", "ppl,recall", "--lengths", "[2400]", "--seed", seed, "--output", tmp_path / f"{seed}"]
        assert run(place, "hf", *options, *more) == 0
        read.append({(s.suite, s.task): s.read_sha256 for s in read_results(tmp_path / f"{seed}").samples})
    assert {name for name in read[0] if read[0][name] == read[1][name]} == {("ppl", "heldout")}
    assert {suite for suite, _ in read[0]} == {"ppl", "recall"} and ("ppl", "by_position") in read[0]
    assert run(place, "hf", *options, "--suite", "ppl", "--max_length", 4096, "--output", tmp_path / "own") == 0
    assert [s.length for s in read_results(tmp_path / "own").scores] == [64, 1024]  # documents of 1,200 tokens


def test_a_killed_evaluation_goes_on_where_it_was(place, tmp_path, monkeypatch):
    """Its results are those of an undisturbed one, and nothing is asked twice; with other settings all is asked again."""
    options = ["--suite", "ppl,recall", "--data", place / "data", "--sequence_length", 64, "--lengths", "[2400,2500]"]
    assert run(place, "hf", *options, "--limit", 3, "--output", tmp_path / "whole") == 0
    asked: list[int] = []
    measured = recall._measure
    stop = 6  # a call is a text here, five of a length (3 passkeys, 1 of each other task), the longest first

    def measure(lm, texts, generated):
        asked.append(texts[0].length)
        if len(asked) == stop:
            raise KeyboardInterrupt
        return measured(lm, texts, generated)

    monkeypatch.setattr(recall, "_measure", measure)
    assert run(place, "hf", *options, "--limit", 3, "--output", tmp_path / "r") == 130
    assert asked == [2500] * 5 + [2400] and not (tmp_path / "r").exists()
    with monkeypatch.context() as changed:
        changed.setattr(suites_ppl, "run_heldout", None)  # it would fail if it were called
        asked, stop = [], 0
        assert run(place, "hf", *options, "--limit", 3, "--output", tmp_path / "r") == 0
    assert asked == [2400] * 5
    found, whole = read_results(tmp_path / "r"), read_results(tmp_path / "whole")
    assert (found.scores, found.samples) == (whole.scores, whole.samples) and found.run["kept_parts"] == 2
    assert "kept_parts" not in whole.run and not list(tmp_path.glob(".*measured"))
    asked, stop = [], 6
    assert run(place, "hf", *options, "--limit", 3, "--output", tmp_path / "other") == 130
    asked, stop = [], 0
    assert run(place, "hf", *options, "--limit", 2, "--output", tmp_path / "other") == 0
    assert asked == [2500] * 4 + [2400] * 4


def test_parts_of_other_weights_settings_inputs_or_code_are_not_put_together(tmp_path):
    """Each of them makes another key; who ran it, where and for how long does not."""
    (tmp_path / "essays.txt").write_text("one")
    model = {"hash": "a", "max_length": 256, "path": "/here"}
    run = {"dtype": "float32", "commit": "c", "version": "1", "libraries": {"torch": "2"}, "seconds": 1.0,
           "settings": {"seed": 0, "data": None, "essays": str(tmp_path / "essays.txt")}}  # fmt: skip
    first = parts_key(model, run)
    assert parts_key(model | {"path": "/there"}, run | {"seconds": 2.0}) == first
    changed = [parts_key(model | change, run) for change in ({"hash": "b"}, {"max_length": 512})]
    others = {"dtype": "bfloat16", "commit": "d", "version": "2", "libraries": {"torch": "3"}, "settings": {"seed": 1}}
    changed += [parts_key(model, run | {name: value}) for name, value in others.items()]
    os.utime(tmp_path / "essays.txt", (1, 1))
    assert first not in [*changed, parts_key(model, run)]


def test_a_model_that_is_replaced_meanwhile_is_described_as_it_was_read(place, tmp_path, monkeypatch):
    """A training run removes its old checkpoints while one is measured."""
    shutil.copytree(place / "model", tmp_path / "model")
    measured = suites_ppl.run_heldout

    def remove(*arguments):
        shutil.rmtree(tmp_path / "model")
        return measured(*arguments)

    monkeypatch.setattr(suites_ppl, "run_heldout", remove)
    options = ["--suite", "ppl", "--data", place / "data", "--sequence_length", 64, "--lengths", "[128]", "--limit", 2]
    assert run(place, tmp_path / "model", *options, "--output", tmp_path / "r") == 0
    about = read_results(tmp_path / "r").model
    assert (about["kind"], about["hash"]) == ("model folder", content_identity(place / "model"))


def test_results_are_shown_where_they_cannot_be_written(place, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    options = ["--suite", "ppl", "--data", place / "data", "--sequence_length", 64, "--lengths", "[128]", "--limit", 2]
    with monkeypatch.context() as changed:
        changed.setattr("megatron_hylo.eval.results_page.write_report", full)
        assert run(place, "hf", *options, "--output", tmp_path / "r") == 2
    said = capsys.readouterr()
    assert "by_position" in said.out and "the disk is full" in said.err and not (tmp_path / "r").exists()
    monkeypatch.setattr(suites_ppl, "run_heldout", None)  # what was measured is kept for the next start
    assert run(place, "hf", *options, "--output", tmp_path / "r") == 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["--suite", ""], "--suite names none"),
        (["--suite", "ppl,gsm8k", "--data", "{place}/data", "--sequence_length", "64"], "GSM8K's answers have up to 256"),
        (["--suite", "ppl", "--data", "{place}/data", "--lengths", "[1]"], "of at least 2, got [1]"),
        (["--suite", "rulers"], "no suite 'rulers'; choose out of ppl, recall, ruler, commonsense, gsm8k"),
        (["--suite", "ppl"], "suite ppl needs --data"),
        (["--suite", "ppl", "--data", "{place}/hf"], "there is no dataset"),
        (["--suite", "ruler", "--lengths", "[4096]"], "longer than this model's window of 256"),
        (
            ["--suite", "ppl,ruler", "--data", "{place}/data", "--sequence_length", "64", "--lengths", "[512]"],
            "longer than this model's window of 256",
        ),
        (["--suite", "recall", "--data", "{place}/nothing"], "nothing does not exist"),
        (["--suite", "ppl,recall", "--data", "{place}/data", "--sequence_length", "64", "--lengths", "[64]"], "of at least"),
        (
            ["--suite", "recall", "--data", "{place}/data", "--lengths", "[512]", "--generated"],
            "past the model's window of 256",
        ),
        (["--suite", "ppl", "--data", "{place}/data", "--output", "{place}/data"], "already exists"),
        (["--suite", "ppl", "--data", "{place}/data", "--batch_size", "many"], "a number of at least 1 or auto"),
        (["--suite", "ppl", "--data", "{place}/data", "--sequence_length", "5000"], "the longest document"),
    ],
)
def test_what_cannot_work_is_refused_before_the_work(place, words, message, capsys, caplog, monkeypatch):
    monkeypatch.setattr("megatron_hylo.eval.suites.fetch_essays", lambda: place)
    assert run(place, "hf", *(word.format(place=place) for word in words)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said and "suite ppl" not in caplog.text  # logged when it begins


def test_a_chat_template_that_there_is_not_is_refused():
    lm = SimpleNamespace(max_length=4096, tokenizer=SimpleNamespace(chat_template=None))
    with pytest.raises(ConfigError, match="tokenizer has none; leave --chat out"):
        run_suites(lm, SuiteSettings(["ruler"], lengths=[1024], chat=True))
