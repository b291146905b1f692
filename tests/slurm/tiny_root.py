"""A HYLO_ROOT as the scripts of slurm/ expect it, of tiny models and made text."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_hylo.data.documents import Document
from megatron_hylo.data.preprocess import build_dataset
from megatron_hylo.models.checkpoint import save_model
from megatron_hylo.models.hylo_model import build_model
from tests.conftest import tiny_config

WIDER = dict(vocab_size=258, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, kv_channels=8)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One id a byte, and the end of a document: 257 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


def make_root(folder: Path) -> Path:
    """Write a teacher, an aligned student wider than it, and text; one rank must be initialised. Returns the folder."""
    texts = [Document("made", f"{i}.txt", " ".join(f"{i} times {j} is {i * j};" for j in range(60))) for i in range(20)]
    build_dataset(texts, byte_tokenizer(), folder / "data" / "mix", vocab_size=258)
    files = folder / "data" / "mix" / "tokenizer"
    save_model(build_model(tiny_config("*-*-", **WIDER)), folder / "models" / "llama3.1-8b", files)
    save_model(build_model(tiny_config("G-+-M-", vocab_size=258)), folder / "stage1_ild" / "model", files)
    return folder


def make_stage1(folder: Path) -> None:
    """Write what stage 1 begins with, a base model and a hybrid of its shapes, for a chain of stages."""
    files, models = folder / "data" / "mix" / "tokenizer", folder / "models"
    save_model(build_model(tiny_config("*-*-", **WIDER)), models / "llama3.2-1b", files)
    hybrid = build_model(tiny_config("G-+-", **WIDER, q_lora_rank=24, kv_lora_rank=16))
    save_model(hybrid, models / "llama3.2-1b-4mla12gdn", files)
