"""Ids of texts by cached words against the tokenizer's own, for the patterns of several families."""

import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_hylo.data.encode import DocumentEncoder, EncoderSettings, _ascii_pattern, plain_encoder, word_pattern

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
STEPS = {
    "gpt2": [BYTES],
    "smollm2": [DIGITS, BYTES],
    "qwen": QWEN,
    "llama3": QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),
    "o200k": O200K,
}
ASCII = list("aZs'tTreDvlm09 \n\t\r\f\v.,(_-/\\\"\x00\x1c\x7f") + ["  ", "\n\n", "'S", "<|endoftext|>", "<|im_end|>", "the"]
OTHERS = [
    "\x85",
    "\xa0",
    "\u2028",
    "\u200b",
    "ſ",
    "\u212a",
    "é",
    "e\u0301",
    "日",
    "Я",
    "²",
    "Ⅷ",
    "٣",
    "\u3000",
    "\U0001f600",
    "ǅ",
]
# letters and digits to one Unicode version alone
NEW = [chr(number) for number in (0x558, 0x88F, 0x295, 0xA7CE, 0x11DE0, 0x3FC3D)]


def family(tokenizer, name):
    """tokenizer.json of a family's way of cutting, with the fixture's merges and an added token that is not special."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = STEPS[name]
    if isinstance(steps, str):
        split = {"type": "Split", "pattern": {"Regex": steps}, "behavior": "Isolated", "invert": False}
        steps = [split, BYTES | {"use_regex": False}]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    content["normalizer"] = {"type": "NFC"} if name == "qwen" else None
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 300, "content": "<tool>", "special": False})
    return json.dumps(content)


@pytest.mark.parametrize("name", STEPS)
def test_ids_by_words_are_the_tokenizers(tokenizer, name):
    """Random texts of what is cut unlike elsewhere: white space, digits, contractions, marks, characters of new Unicode."""
    content, generator = family(tokenizer, name), random.Random(name)
    plain = plain_encoder(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(content)))
    encoder = DocumentEncoder(EncoderSettings(content, 0, "uint16"))
    assert encoder.words is not None
    alphabets = [ASCII] * 3 + [ASCII + OTHERS] * 3 + [[*ASCII, "<tool>"], [*OTHERS, *NEW, *"a 1"]]
    texts = ["".join(generator.choices(generator.choice(alphabets), k=generator.randint(1, 24))) for _ in range(6000)]
    assert 0.5 < sum(map(encoder.words.can_encode, texts)) / len(texts) < 1
    for _ in range(2):  # the second time all words are cached
        found = encoder.encode(texts)
        ids = np.split(np.frombuffer(found.ids, np.uint16), np.cumsum(found.lengths))[:-1]
        wanted = plain.encode_batch_fast(texts, add_special_tokens=False)
        assert [mine.tolist() for mine in ids] == [[*theirs.ids, 0] for theirs in wanted]


def test_tokenizers_that_cut_otherwise_are_not_guessed_at(tokenizer):
    content = json.loads(family(tokenizer, "gpt2"))
    for change in (
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}},
        {"pre_tokenizer": BYTES | {"add_prefix_space": True}},
        {"pre_tokenizer": None},
        {"model": content["model"] | {"dropout": 0.1}},
        {"added_tokens": [content["added_tokens"][0] | {"lstrip": True}]},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, BYTES]}},
    ):
        assert word_pattern(json.dumps(content | change)) is None
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert word_pattern(words.to_str()) is None
    assert word_pattern(family(tokenizer, "gpt2").replace("\\\\p{N}", "x")) is not None
    odd = family(tokenizer, "qwen").replace("(?!", "(?<!")
    assert word_pattern(odd) is None
    assert _ascii_pattern(r"[\p{Lu}]") is None and _ascii_pattern(r"\p{L}+\S").findall("ab!") == ["ab!"]
