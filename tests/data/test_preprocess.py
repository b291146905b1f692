"""Tokenised datasets: the same ids as transformers, whole documents held out, nothing half-written."""

import json
import random
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_hylo.config import ConfigError
from megatron_hylo.data.documents import Document
from megatron_hylo.data.make_dataset import heldout_score
from megatron_hylo.data.preprocess import build_dataset, preprocess
from megatron_hylo.io import verify_manifest
from tests.data.conftest import END, make_documents

ROOT = Path(__file__).parents[2]


def test_ids_match_transformers_tokenizer(tmp_path, tokenizer):
    documents = make_documents(1500)  # more than a batch
    out = tmp_path / "data"
    description = build_dataset(documents, tokenizer, out, heldout_fraction=0.1)
    train, heldout = IndexedDataset(str(out / "train")), IndexedDataset(str(out / "heldout"))
    expected = {True: [], False: []}
    for document in documents:
        expected[heldout_score(document.name) < 0.1].append(
            tokenizer(document.text, add_special_tokens=False)["input_ids"] + [0]
        )
    for dataset, ids in ((train, expected[False]), (heldout, expected[True])):
        assert len(dataset) == len(ids)
        assert all(np.array_equal(dataset[i], ids[i]) for i in range(len(ids)))
    assert (description.train_documents, description.heldout_documents) == (len(expected[False]), len(expected[True]))
    assert description.train_tokens == sum(map(len, expected[False]))
    assert description.heldout_tokens == sum(map(len, expected[True]))
    assert 0.05 < description.heldout_documents / 1500 < 0.15
    assert description.dtype == "uint16" and train.index.dtype == np.uint16
    assert json.loads((out / "data.json").read_text())["vocab_size"] == 300
    assert PreTrainedTokenizerFast.from_pretrained(out / "tokenizer").get_vocab() == tokenizer.get_vocab()
    verify_manifest(out)


def test_held_out_documents_do_not_depend_on_order_or_company(tmp_path, tokenizer):
    documents = make_documents(200)
    names = set(build_dataset(documents, tokenizer, tmp_path / "a", 0.2).heldout_names)
    shuffled = random.Random(0).sample(documents, k=200)
    assert set(build_dataset(shuffled, tokenizer, tmp_path / "b", 0.2).heldout_names) == names
    half = build_dataset(documents[:100], tokenizer, tmp_path / "c", 0.2).heldout_names
    assert set(half) == names & {f"made/{document.name}" for document in documents[:100]}


def test_small_sets_have_both_sides(tmp_path, tokenizer):
    for fraction in (0.001, 0.999):
        description = build_dataset(make_documents(2), tokenizer, tmp_path / str(fraction), fraction)
        assert (description.train_documents, description.heldout_documents) == (1, 1)
    with pytest.raises(ConfigError, match="one document cannot be both"):
        build_dataset(make_documents(1), tokenizer, tmp_path / "one")
    assert build_dataset(make_documents(1), tokenizer, tmp_path / "one", 0.0).heldout_documents == 0
    assert not (tmp_path / "one" / "heldout.bin").exists()


def test_text_that_looks_like_a_special_token_is_text(tmp_path, tokenizer):
    text = f"a {END} b <|im_end|> c"
    build_dataset([Document("made", "a", text)], tokenizer, tmp_path / "data", 0.0)
    dataset = IndexedDataset(str(tmp_path / "data" / "train"))
    ids = dataset[0]
    assert list(np.flatnonzero(ids <= 1)) == [len(ids) - 1]
    assert tokenizer.decode(ids[:-1]) == text
    assert tokenizer(END, add_special_tokens=False)["input_ids"] == [0]  # the caller's tokenizer is untouched


def test_large_vocabulary_is_stored_in_int32(tmp_path):
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1")
    build_dataset([Document("made", "a", "w69999 w65535 w2")], fast, tmp_path / "data", 0.0)
    dataset = IndexedDataset(str(tmp_path / "data" / "train"))
    assert dataset.index.dtype == np.int32
    assert dataset[0].tolist() == [69_999, 65_535, 2, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 200}, r"made/0.txt holds token id 2\d\d, the vocabulary of the model has 200"),
        ({"end_token_id": 300}, "end_token_id 300"),
        ({"vocab_size": 200, "end_token_id": 250}, "the end of every document holds token id 250, .* the model has 200"),
        ({"heldout_fraction": 1.0}, "heldout_fraction"),
        ({"max_documents": 0}, "max_documents"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, tokenizer, options, message):
    with pytest.raises(ConfigError, match=message):
        build_dataset(make_documents(4), tokenizer, tmp_path / "data", **options)
    assert list(tmp_path.iterdir()) == []


def test_no_text_and_existing_output_are_refused(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="no text"):
        build_dataset([Document("made", "a", " \n")], tokenizer, tmp_path / "data")
    build_dataset(make_documents(4), tokenizer, tmp_path / "data")
    with pytest.raises(ConfigError, match="already exists"):
        build_dataset(make_documents(4), tokenizer, tmp_path / "data")
    assert (
        build_dataset(make_documents(9), tokenizer, tmp_path / "data", 0.0, max_documents=5, overwrite=True).train_documents
        == 5
    )


def test_an_exception_in_the_middle_leaves_nothing(tmp_path, tokenizer):
    def broken():
        yield from make_documents(3000)
        raise OSError("the disk was pulled out")

    with pytest.raises(OSError, match="pulled out"):
        build_dataset(broken(), tokenizer, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_preprocess_tool_makes_the_dataset_of_a_folder(tmp_path, tokenizer, monkeypatch, capsys):
    for document in make_documents(6):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / document.name).write_text(document.text)
    tokenizer.save_pretrained(tmp_path / "hf")
    tool, folders = ROOT / "tools" / "preprocess_data.py", (tmp_path / "text", tmp_path / "data")
    monkeypatch.setattr(sys, "argv", [str(tool), *map(str, folders), "--tokenizer", str(tmp_path / "hf"), "--json"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(tool), run_name="__main__")
    assert json.loads(capsys.readouterr().out)["train_documents"] == 5
    mine = build_dataset(make_documents(6), tokenizer, tmp_path / "mine")
    assert (tmp_path / "mine" / "train.bin").read_bytes() == (tmp_path / "data" / "train.bin").read_bytes()
    assert mine.heldout_documents == 1
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(tool), run_name="__main__")
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "already exists" in error


def test_preprocess_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "text").mkdir()
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        preprocess(str(tmp_path / "text"), str(tmp_path / "data"), str(tmp_path / "text"))
