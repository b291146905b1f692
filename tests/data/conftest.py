"""A real, tiny byte-level BPE tokenizer and documents that it was trained on."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_hylo.data.documents import Document

WORDS = [
    "the",
    "state",
    "of",
    "a",
    "linear",
    "layer",
    "is",
    "small,",
    "so",
    "long",
    "text",
    "costs",
    "no",
    "more",
    "memory",
    "than",
    "short",
    "text",
    "does;",
    "attention",
    "keeps",
    "all",
]
END = "<|endoftext|>"


def make_documents(count: int, words: int = 40) -> list[Document]:
    """Documents of random words, each unlike the others."""
    generator = random.Random(count)
    return [Document("made", f"{i}.txt", f"{i}: " + " ".join(generator.choices(WORDS, k=words))) for i in range(count)]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """300 ids; <|endoftext|> is 0, <|im_end|> (its eos_token) is 1."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END, "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([document.text for document in make_documents(50)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>")
