"""Files from others, each made to run code when it is read: nothing runs, and a sentence says what was refused.

The oracle is a marker file that the code would make. Each file is read by the verb that reads its kind.
"""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_hylo.cli.main import main
from megatron_hylo.config import ConfigError
from megatron_hylo.io import DamagedError, atomic_directory
from megatron_hylo.models.checkpoint import load_model, save_model
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.platform.safe_loading import parse_metadata
from tests.conftest import tiny_config, tiny_hf_model
from tests.data.conftest import tokenizer  # noqa: F401  the fixture

COMMON = "common_state/shard_0_1"


class Touch:
    """Makes `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "marker"


@pytest.fixture(scope="module")
def ours(one_rank, tmp_path_factory) -> Path:
    """A model folder of ours."""
    path = tmp_path_factory.mktemp("foreign") / "ours"
    save_model(build_model(tiny_config("G-*-")), path)
    return path


@pytest.fixture
def foreign(ours, tmp_path):
    """(change) -> folder made from ours by somebody else, whose manifest fits what they did to it."""

    def make(change) -> Path:
        with atomic_directory(tmp_path / "foreign") as folder:
            shutil.copytree(ours, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
            change(folder)
        return tmp_path / "foreign"

    return make


def metadata(folder: Path) -> Metadata:
    return pickle.loads((folder / "weights" / ".metadata").read_bytes())


def put_entry(folder: Path, key: str, content: bytes) -> None:
    """Place `content` where the entry `key` is read from."""
    found = metadata(folder)
    file = folder / "weights" / "__0_0.distcp"
    where = next(info for index, info in found.storage_data.items() if index.fqn == key)
    where.offset, where.length = file.stat().st_size, len(content)
    file.write_bytes(file.read_bytes() + content)
    (folder / "weights" / ".metadata").write_bytes(pickle.dumps(found))


def saved(value: object, legacy: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def hidden_in_metadata(folder: Path, marker: Path) -> None:
    found = metadata(folder)
    found.state_dict_metadata["extra"] = Touch(marker)
    (folder / "weights" / ".metadata").write_bytes(pickle.dumps(found))


POISONS = {
    "metadata": lambda folder, marker: (folder / "weights" / ".metadata").write_bytes(pickle.dumps(Touch(marker))),
    "inside metadata": hidden_in_metadata,
    "object entry": lambda folder, marker: put_entry(folder, COMMON, saved([Touch(marker)], legacy=False)),
    "object entry, legacy format": lambda folder, marker: put_entry(folder, COMMON, saved([Touch(marker)], legacy=True)),
    "object entry, bare pickle": lambda folder, marker: put_entry(folder, COMMON, pickle.dumps([Touch(marker)])),
    "tensor entry": lambda folder, marker: put_entry(
        folder, "embedding.word_embeddings.weight", saved(Touch(marker), legacy=False)
    ),
    "common.pt": lambda folder, marker: torch.save(Touch(marker), folder / "weights" / "common.pt"),
}
SAID = {"common.pt": "it holds common.pt", "object entry, bare pickle": f"entry '{COMMON}' of a checkpoint"}


@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_model_folder_runs_nothing(foreign, marker, poison):
    folder = foreign(lambda folder: POISONS[poison](folder, marker))
    with pytest.raises((ConfigError, DamagedError), match=SAID.get(poison, "posix.system")) as refused:
        load_model(folder)
    assert not marker.exists() and "was not written by this project" in str(refused.value)


def test_metadata_is_read_as_pickle_reads_it(ours):
    theirs, mine = metadata(ours), parse_metadata((ours / "weights" / ".metadata").read_bytes())
    assert mine.state_dict_metadata == theirs.state_dict_metadata and mine.storage_data == theirs.storage_data
    assert type(mine.state_dict_metadata[COMMON]) is BytesStorageMetadata and len(mine.storage_data) > 10


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "Ran out of input"),
        (bytes(range(64)), "invalid load key"),
        (b"cos\nsystem\n(S'true'\ntR.", "names os.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.", "names builtins.eval"),
        (b"ctorch\nhub.load\n.", "names torch.hub.load"),
        # sets attributes of the class itself
        (b"ctorch\nSize\nN}S'__new__'\nK\x01s\x86b.", "missing 1 required positional argument"),
        (pickle.dumps(Metadata({1: BytesStorageMetadata()})), "int where text belongs"),
        (pickle.dumps(Metadata({"a": torch.Size([1])})), "torch.Size where .*TensorStorageMetadata belongs"),
        (pickle.dumps([1]), "list where .*Metadata belongs"),
    ],
)
def test_other_pickles_are_not_metadata(data, said):
    with pytest.raises(ValueError, match=said):
        parse_metadata(data)


def test_a_tensor_is_read_from_its_own_folder_only(foreign):
    def elsewhere(folder: Path) -> None:
        found = metadata(folder)
        next(iter(found.storage_data.values())).relative_path = "../../private.distcp"
        (folder / "weights" / ".metadata").write_bytes(pickle.dumps(found))

    with pytest.raises(ConfigError, match=r"'\.\./\.\./private\.distcp', outside its folder"):
        load_model(foreign(elsewhere))


@pytest.fixture
def theirs(tmp_path, tokenizer) -> Path:  # noqa: F811
    """A Hugging Face folder with its tokenizer."""
    tiny_hf_model("llama", vocab_size=304).save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def edit(file: Path, **changes) -> None:
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(known | changes))


def pickled_weights(folder: Path, marker: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Touch(marker)}, folder / "pytorch_model.bin")


def code(marker: Path) -> str:
    return f"import os\nos.system('touch {marker}')\nclass X: pass\ndef generate(**k): pass\n"


def model_code(folder: Path, marker: Path) -> None:
    (folder / "modeling_x.py").write_text(code(marker))
    edit(folder / "config.json", model_type="x", auto_map={n: "modeling_x.X" for n in ("AutoConfig", "AutoModelForCausalLM")})


def tokenizer_code(folder: Path, marker: Path) -> None:
    (folder / "tokenization_x.py").write_text(code(marker))
    edit(folder / "tokenizer_config.json", tokenizer_class="X", auto_map={"AutoTokenizer": ["tokenization_x.X", None]})


def generation_code(folder: Path, marker: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code(marker))


def attention_code(folder: Path, marker: Path) -> None:
    edit(folder / "config.json", attn_implementation="somebody/kernels", _attn_implementation="somebody/kernels")


def another_model(folder: Path, marker: Path) -> None:
    edit(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path=str(folder.parent / "elsewhere"))


FOREIGN = {"pickled weights": pickled_weights, "model code": model_code, "tokenizer code": tokenizer_code,
           "generation code": generation_code, "attention code": attention_code,
           "another model's adapter": another_model}  # fmt: skip


@pytest.mark.parametrize("poison", FOREIGN)
@pytest.mark.parametrize("verb", ["convert", "generate"])
def test_a_poisoned_hugging_face_folder_runs_nothing(one_rank, theirs, marker, capsys, monkeypatch, poison, verb):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    FOREIGN[poison](theirs, marker)
    arguments = [str(theirs.parent / "out")] if verb == "convert" else ["hello", "--max_new_tokens", "1"]
    with pytest.raises(SystemExit) as ended:
        main([verb, str(theirs), *arguments])
    said = "".join(capsys.readouterr())
    assert not marker.exists() and "Traceback" not in said
    if poison in ("generation code", "attention code"):  # left alone
        assert ended.value.code == 0, said
    elif (verb, poison) != ("convert", "another model's adapter"):
        assert ended.value.code == 2 and "error:" in said


def test_yaml_runs_nothing(tmp_path, marker, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"stage: !!python/object/apply:os.system ['touch {marker}']\n")
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", str(recipe)])
    assert ended.value.code == 2 and not marker.exists()
    assert "Traceback" not in "".join(capsys.readouterr())
