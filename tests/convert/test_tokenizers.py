"""Tokenizers of source folders, against the library whose files they are."""

import json

import pytest
import sentencepiece

from megatron_hylo.config import ConfigError
from megatron_hylo.data.artefacts import fetch_mistral_tokenizer
from megatron_hylo.data.load_tokenizer import load_transformers_tokenizer
from megatron_hylo.data.tokenizer import check_same_vocabulary

TEXTS = ("Rotary  position   embeddings", " x = 1\n\n    return x", "Grüße, 世界 \U0001f600", "1234 5.67e-8\ttabs")


def train(folder, **settings):
    """A SentencePiece model of this file's own words, as Llama's is made: BPE, digits apart, bytes for what is unknown."""
    folder.mkdir()
    text = open(__file__, encoding="utf-8").read()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_prefix=str(folder / "tokenizer"), vocab_size=420,
        minloglevel=2, **({"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
                           "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True} | settings),
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    return folder


def assert_same_tokens(folder, texts) -> None:
    tokenizer = load_transformers_tokenizer(folder)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in texts:
        assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text), text
        assert tokenizer.decode(processor.encode(text)) == processor.decode(processor.encode(text))
        assert tokenizer.encode(text) == [processor.bos_id(), *processor.encode(text)]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (processor.bos_id(), processor.eos_id())
    assert len(tokenizer) == processor.get_piece_size()


@pytest.mark.parametrize(
    "settings",
    [{}, {"remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"}, {"add_dummy_prefix": False}],
    ids=["as Llama", "normalised", "no space before"],
)
def test_tokens_of_a_folder_with_tokenizer_model_alone_are_sentencepieces(settings, tmp_path) -> None:
    assert_same_tokens(train(tmp_path / "folder", **settings), TEXTS)


def test_settings_beside_a_tokenizer_model_are_taken_over(tmp_path) -> None:
    folder = train(tmp_path / "folder")
    settings = {"add_bos_token": False, "eos_token": "<|end|>", "chat_template": "{{ messages[0].content }}",
                "added_tokens_decoder": {"420": {"content": "<|end|>", "special": True}}}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_transformers_tokenizer(folder)
    assert (tokenizer.eos_token_id, len(tokenizer)) == (420, 421)
    assert tokenizer("x<|end|>").input_ids[-1] == 420 and tokenizer("x").input_ids[0] != tokenizer.bos_token_id
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_another_tokenizer_model_with_the_same_settings_is_another_vocabulary(tmp_path) -> None:
    folders = [train(tmp_path / name) for name in ("one", "same")] + [train(tmp_path / "other", user_defined_symbols=["zebra"])]
    for folder in folders:
        (folder / "tokenizer_config.json").write_text("{}")
    check_same_vocabulary(folders[0], folders[1])
    with pytest.raises(ConfigError, match="have different tokenizers: id [0-9]+ is "):
        check_same_vocabulary(folders[0], folders[2])


def test_a_tokenizer_model_that_is_none_is_refused_in_words(tmp_path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(ConfigError, match="tokenizer.model is in tiktoken's format; give a folder with tokenizer.json"):
        load_transformers_tokenizer(tmp_path)
    file.write_bytes(b"\x00\x01broken")
    with pytest.raises(ConfigError, match="is not a whole SentencePiece model"):
        load_transformers_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="of another kind than BPE"):
        load_transformers_tokenizer(train(tmp_path / "unigram", model_type="unigram"))


@pytest.mark.network
def test_tokens_of_mistrals_tokenizer_model_are_sentencepieces() -> None:
    assert_same_tokens(fetch_mistral_tokenizer(), (*TEXTS, open(__file__, encoding="utf-8").read()))
