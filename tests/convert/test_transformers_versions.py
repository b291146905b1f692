"""What is converted back to Hugging Face, read by the oldest and the newest transformers that are supported."""

import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from megatron_hylo.convert.hf_config import TRANSFORMERS_VERSIONS, hf_config_from_model, model_config_from_hf
from megatron_hylo.convert.source_path import read_hf_config
from megatron_hylo.convert.to_hf import convert_megatron_to_hf
from megatron_hylo.convert.to_megatron import convert_hf_to_megatron
from tests.conftest import tiny_config, tiny_hf_model

ROOT = Path(__file__).parents[2]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 5e5}  # fmt: skip
CASES = {
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),  # whose factor is not the ratio of the lengths
    "qwen3_moe": ("qwen3_moe", {"num_hidden_layers": 2, "mlp_only_layers": [0]}),
    "qwen3-yarn-exact": ("qwen3", {"rope_parameters": YARN | {"truncate": False, "attention_factor": 1.3, "beta_fast": 16.0}}),
}
READ = """
import sys, torch, transformers
found = {}
for folder in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = (torch.arange(120) % 160)[None]
    with torch.no_grad():
        found[folder] = {"logits": model(ids).logits, "dtype": str(model.dtype), "tokens": tokenizer("a b  c").input_ids,
                         "stops": [model.config.eos_token_id, model.generation_config.eos_token_id],
                         "ids": [model.config.bos_token_id, model.config.pad_token_id, tokenizer.eos_token]}
torch.save((transformers.__version__, found), sys.argv[1])
"""


def source_folder(folder: Path, family: str, changes: dict, dtype: torch.dtype) -> Path:
    """A teacher with a tokenizer and, beside config.json's, ends of its own in generation_config.json."""
    model = tiny_hf_model(family, bos_token_id=3, eos_token_id=4, **changes).to(dtype)
    model.generation_config.eos_token_id = [4, 5]
    model.save_pretrained(folder)
    words = {word: i for i, word in enumerate(["a", "b", "c", "<s>", "</s>", "<pad>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="c"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(one_rank, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """(source, converted there and back) of each case; the last one in bfloat16."""
    where = tmp_path_factory.mktemp("versions")
    made = {}
    for case, (family, changes) in CASES.items():
        dtype = torch.bfloat16 if case == "qwen3-yarn-exact" else torch.float32
        source = source_folder(where / case, family, changes, dtype)
        convert_hf_to_megatron(source, where / f"{case}-megatron")
        convert_megatron_to_hf(where / f"{case}-megatron", where / f"{case}-back")
        made[case] = source, where / f"{case}-back"
    return made


def check(found: dict, folders: dict[str, tuple[Path, Path]]) -> None:
    for case, (source, back) in folders.items():
        expected = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
        with torch.no_grad():
            logits = expected((torch.arange(120) % 160)[None]).logits
        read = found[str(back)]
        assert read["dtype"] == str(expected.dtype), case
        tolerance = 2e-5 if expected.dtype == torch.float32 else 0.1
        assert logits.std() > 0.1
        torch.testing.assert_close(read["logits"], logits, rtol=0, atol=tolerance, msg=lambda m, case=case: f"{case}: {m}")
        assert read["stops"] == [[4, 5], [4, 5]] and read["ids"] == [3, 5, "</s>"] and read["tokens"] == [0, 1, 2]


def test_the_oldest_transformers_reads_what_is_written(folders, transformers4, tmp_path) -> None:
    transformers4(READ, tmp_path / "found.pt", *(back for _, back in folders.values()))
    version, found = torch.load(tmp_path / "found.pt")
    assert version == TRANSFORMERS_VERSIONS[0]
    check(found, folders)


def test_the_newest_transformers_reads_what_is_written(folders, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "found.pt"), *(str(back) for _, back in folders.values())])
    exec(READ, {})
    version, found = torch.load(tmp_path / "found.pt")
    assert version == TRANSFORMERS_VERSIONS[1]
    check(found, folders)


def test_what_is_written_is_read_alike_by_ourselves(folders) -> None:
    for case, (source, back) in folders.items():
        assert model_config_from_hf(read_hf_config(source)) == model_config_from_hf(read_hf_config(back)), case


def test_a_config_without_token_ids_says_null_and_a_hybrid_has_them() -> None:
    """transformers' Llama would take 1 and 2 for them where config.json says nothing."""
    plain = hf_config_from_model(tiny_config("*-*-"), "float32")
    assert [plain[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")] == [None] * 3
    assert transformers.LlamaConfig.from_dict(plain).eos_token_id is None
    hybrid = hf_config_from_model(tiny_config(), "bfloat16", {"eos_token_id": [4, 5]})
    assert (hybrid["eos_token_id"], hybrid["bos_token_id"], hybrid["torch_dtype"], hybrid["dtype"]) == (
        [4, 5], None, "bfloat16", "bfloat16",
    )  # fmt: skip


def test_versions_stated_are_those_that_are_tested() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    older = dict(line.split("==") for line in (ROOT / "tests/transformers4.txt").read_text().split() if "==" in line)
    assert TRANSFORMERS_VERSIONS == (older["transformers"], pinned["transformers"])
    assert f"transformers=={pinned['transformers']} " in (ROOT / "tests/transformers_source.txt").read_text()
