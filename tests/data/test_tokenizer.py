"""Vocabularies compared by what ids mean; the oracle is the map that each tokenizer was made with."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from megatron_hylo.config import ConfigError
from megatron_hylo.config.text import TextPart
from megatron_hylo.data import tokenizer as compared
from megatron_hylo.data.documents import Document
from megatron_hylo.data.preprocess import build_dataset
from megatron_hylo.data.tokenizer import check_dataset, check_ids, check_same_vocabulary, read_vocabulary, vocabulary_difference
from megatron_hylo.data.training_windows import training_windows
from tests.data.conftest import END, make_documents
from tests.data.test_text_sources import config


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer) -> Path:
    """`data` and tokenizer folders: the `same` in another file, two tokens `swapped`, one more `added`, one `renamed`."""
    root = tmp_path_factory.mktemp("tokenizers")
    build_dataset(make_documents(20), tokenizer, root / "data", 0.1)
    tokenizer.save_pretrained(root / "same")
    file = root / "same" / "tokenizer.json"
    for name in ("swapped", "renamed", "renamed_end"):
        shutil.copytree(root / "same", root / name)
        text = json.loads(file.read_text())
        vocabulary = text["model"]["vocab"]
        if name == "swapped":
            vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
        else:
            old, new = ("<|im_end|>", "<|turn|>") if name == "renamed" else (END, "<|stop|>")
            vocabulary[new] = vocabulary.pop(old)
            for token in text["added_tokens"]:
                token["content"] = new if token["content"] == old else token["content"]
        (root / name / "tokenizer.json").write_text(json.dumps(text))
        settings = root / name / "tokenizer_config.json"
        settings.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    file.write_text(json.dumps(json.loads(file.read_text()), indent=7))
    larger = PreTrainedTokenizerFast.from_pretrained(root / "same")
    larger.add_tokens([AddedToken("linear layer")])
    larger.save_pretrained(root / "added")
    return root


def test_a_vocabulary_is_the_map_that_the_tokenizer_has(folders, tokenizer):
    found = read_vocabulary(folders / "data")
    assert {token: number for number, token in found.tokens.items()} == tokenizer.get_vocab()
    assert found.identity == read_vocabulary(folders / "same").identity
    assert found.identity == json.loads((folders / "data" / "data.json").read_text())["vocabulary_sha256"]
    others = [read_vocabulary(folders / name).identity for name in ("swapped", "renamed", "added")]
    assert len({found.identity, *others}) == 4
    assert read_vocabulary(folders) is None


def test_other_files_of_one_vocabulary_agree_and_another_is_named(folders):
    check_same_vocabulary(folders / "data", folders / "same")
    check_dataset(folders / "data", folders / "same", 300)
    ids = sorted(PreTrainedTokenizerFast.from_pretrained(folders / "same").convert_tokens_to_ids(["e", "t"]))
    for check in (check_same_vocabulary, check_dataset):
        with pytest.raises(ConfigError, match=rf"id {ids[0]} is 'e' in .*same.* and 't' in .*swapped; id {ids[1]} is 't'"):
            check(folders / "same", folders / "swapped")
    assert "is 'e' in" in vocabulary_difference(folders / "same", folders / "swapped")
    assert "id 300 is no token in" in vocabulary_difference(folders / "same", folders / "added")
    assert vocabulary_difference(folders / "same", folders / "data") is None


def test_only_tokens_that_occur_in_a_dataset_must_agree(folders, caplog):
    compared._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        check_dataset(folders / "data", folders / "renamed", 300)
    assert "in no token that" in caplog.text and "id 1 is '<|im_end|>'" in caplog.text
    with pytest.raises(ConfigError, match=r"made with another tokenizer than that of .*renamed_end: id 0 is '<\|endoftext\|>'"):
        check_dataset(folders / "data", folders / "renamed_end", 300)
    with pytest.raises(ConfigError, match="different tokenizers"):
        check_same_vocabulary(folders / "same", folders / "renamed")


def test_a_missing_tokenizer_is_said_and_a_verified_model_must_have_one(folders, tmp_path, caplog):
    compared._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        check_dataset(folders / "data", tmp_path)
        check_dataset(folders / "data", tmp_path)
    said = f"the tokenizers of {folders / 'data'} and {tmp_path} are not compared: {tmp_path} without one"
    assert caplog.text.count(said) == 1
    assert vocabulary_difference(folders / "same", tmp_path) == f"{tmp_path} has no tokenizer, {folders / 'same'} has one"
    assert vocabulary_difference(tmp_path, tmp_path) is None


def test_an_added_token_beyond_the_embedding_matters_where_it_occurs(folders, tmp_path, caplog):
    larger = PreTrainedTokenizerFast.from_pretrained(folders / "added")
    assert max(larger.get_vocab().values()) == 300
    without = [Document("made", "a", "text about a linear state"), Document("made", "b", "no more")]
    described = build_dataset(without, larger, tmp_path / "without", 0.5, vocab_size=300)
    assert (described.vocab_size, described.largest_token_id < 300) == (301, True)
    assert "the tokenizer has ids up to 300, the model's vocabulary is 300" in caplog.text
    check_dataset(tmp_path / "without", folders / "same", 300)
    text = [*without, Document("made", "c", "a linear layer"), Document("made", "d", "b")]
    with pytest.raises(ConfigError, match=r"made/c holds token id 300, the vocabulary of the model has 300 \(0 to 299\)"):
        build_dataset(text, larger, tmp_path / "with", 0.5, vocab_size=300)
    assert build_dataset(text, larger, tmp_path / "with", 0.5).largest_token_id == 300
    with pytest.raises(ConfigError, match="with holds token id 300"):
        check_dataset(tmp_path / "with", folders / "added", 300)
    with pytest.raises(ConfigError, match="with was made with another tokenizer than that of .*same: id 300 is 'linear layer'"):
        check_dataset(tmp_path / "with", folders / "same", 301)


@pytest.mark.parametrize("occurs", ["nowhere", "train", "heldout"])
def test_a_dataset_of_an_earlier_version_is_read_for_its_largest_id(folders, tmp_path, occurs):
    larger = PreTrainedTokenizerFast.from_pretrained(folders / "added")
    held = build_dataset([Document("made", str(i), "a layer") for i in range(4)], larger, tmp_path / "data", 0.5).heldout_names
    parts = {i: "heldout" if f"made/{i}" in held else "train" for i in range(4)}
    text = [Document("made", str(i), "a linear layer" if part == occurs else "a layer") for i, part in parts.items()]
    build_dataset(text, larger, tmp_path / "data", 0.5, overwrite=True)
    described = json.loads((tmp_path / "data" / "data.json").read_text())
    del described["largest_token_id"]
    (tmp_path / "data" / "data.json").write_text(json.dumps(described))
    if occurs != "nowhere":
        with pytest.raises(ConfigError, match="holds token id 300"):
            check_dataset(tmp_path / "data", folders / "added", 300)
    else:
        check_dataset(tmp_path / "data", folders / "added", 300)


def test_parts_of_a_blend_of_another_tokenizer_are_refused(folders, tmp_path):
    for name in ("same", "swapped"):
        build_dataset(make_documents(30), PreTrainedTokenizerFast.from_pretrained(folders / name), tmp_path / name, 0.1)
    data, same, swapped = (TextPart(str(path)) for path in (folders / "data", tmp_path / "same", tmp_path / "swapped"))
    training_windows(config(data, same))
    with pytest.raises(ConfigError, match="swapped was made with another tokenizer than that of .*data: id [0-9]+ is '[et]'"):
        training_windows(config(data, same, swapped))


def test_ids_outside_a_vocabulary_are_refused_on_either_side():
    check_ids(299, 300, "data", "model")
    check_ids(torch.tensor([[0, 299]]), 300, "data", "model")
    for ids, named in ((300, 300), (-1, -1), (torch.tensor([[4, 300]]), 300), (torch.tensor([[4, -7], [300, 0]]), -7)):
        with pytest.raises(ConfigError, match=rf"data holds token id {named}, the vocabulary of model has 300 \(0 to 299\)"):
            check_ids(ids, 300, "data", "model")
