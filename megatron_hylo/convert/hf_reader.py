"""Read a Hugging Face folder (safetensors, sharded or not) or a GGUF file, tensor by tensor.

Everything that can be wrong with the files is found before the first tensor is used: headers of all shards are
read and compared with the index, the sizes and the names that the configuration asks for.
"""

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.convert.foreign import load_foreign_model, load_foreign_tokenizer
from megatron_hylo.convert.hf_config import model_config_from_hf
from megatron_hylo.tensor_names import tensor_names

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class TensorSource(Protocol):
    """Where converted tensors come from."""

    config: ModelConfig

    def read(self, name: str) -> Tensor:
        """The whole tensor of that Hugging Face name, on the CPU, in the file's dtype."""
        ...

    def dtype(self) -> torch.dtype:
        """The dtype most weights are stored in (float16 is read exactly as float32)."""
        ...


class SafetensorsSource:
    """A Hugging Face folder; one shard is open at a time."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = model_config_from_hf(read_hf_config(self.folder))
        self._open_shard: tuple[str, Any] | None = None
        self.shard_of = self._map_shards()
        self._check_tensors()

    def _map_shards(self) -> dict[str, str]:
        index = self.folder / INDEX
        if index.is_file():
            shard_of = json.loads(index.read_text())["weight_map"]
        elif (self.folder / SINGLE).is_file():
            shard_of = {name: SINGLE for name in self._shard(SINGLE).keys()}
        else:
            raise ConfigError(f"{self.folder} holds neither {SINGLE} nor {INDEX}; only safetensors checkpoints are read")
        for shard in sorted(set(shard_of.values())):
            if not (self.folder / shard).is_file():
                raise ConfigError(f"{self.folder / shard} is missing, though the index names it; download the checkpoint again")
            present = set(self._shard(shard).keys())
            lost = [name for name, where in shard_of.items() if where == shard and name not in present]
            if lost:
                raise ConfigError(f"{self.folder / shard} lacks tensor {lost[0]}, though the index places it there")
        return shard_of

    def _shard(self, name: str) -> Any:
        if self._open_shard is None or self._open_shard[0] != name:
            try:
                self._open_shard = (name, safe_open(self.folder / name, framework="pt", device="cpu"))
            except (SafetensorError, OSError) as error:
                message = f"{self.folder / name} is corrupt or cut short ({error}); download the checkpoint again"
                raise ConfigError(message) from error
        return self._open_shard[1]

    def _check_tensors(self) -> None:
        for name, shape in tensor_names(self.config).items():
            if name not in self.shard_of:
                raise ConfigError(f"{self.folder} has no tensor {name}, which its config.json asks for")
            found = tuple(self._shard(self.shard_of[name]).get_slice(name).get_shape())
            if found != tuple(shape):
                raise ConfigError(f"tensor {name} has shape {list(found)}, config.json asks for {list(shape)}")

    def read(self, name: str) -> Tensor:
        """The tensor of that name."""
        return exact(self._shard(self.shard_of[name]).get_tensor(name))

    def dtype(self) -> torch.dtype:
        """Of the embedding."""
        return self.read("model.embed_tokens.weight").dtype


class StateDictSource:
    """Tensors already in memory: those of a transformers model, read out of a GGUF file."""

    def __init__(self, config: ModelConfig, model: Any) -> None:
        self.config, self.model = config, model
        self.state = model.state_dict()

    def read(self, name: str) -> Tensor:
        """The tensor of that name."""
        return exact(self.state[name])

    def dtype(self) -> torch.dtype:
        """Of the embedding."""
        return self.read("model.embed_tokens.weight").dtype


def exact(tensor: Tensor) -> Tensor:
    """float16 as float32, which holds every float16; other dtypes unchanged."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def read_hf_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder.

    Raises:
        ConfigError: the folder or the file is not there, or is not JSON.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"{folder} is not a Hugging Face folder: it has no config.json")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error


def gguf_file(path: Path) -> Path | None:
    """The one .gguf file at `path` (the file itself, or a folder with exactly one and no config.json)."""
    if path.suffix == ".gguf":
        return path
    files = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").is_file() else []
    if len(files) > 1:
        raise ConfigError(f"{path} holds several .gguf files; name one of {', '.join(f.name for f in files)}")
    return files[0] if files else None


def _transformers() -> Any:
    """transformers, imported when it is needed (seconds) and without its progress bars."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_transformers_model(path: str | Path) -> Any:
    """The model at `path` (Hugging Face folder or GGUF) through transformers, fp32, eval mode: the oracle."""
    transformers = _transformers()
    path = Path(path)
    gguf = gguf_file(path)
    if gguf is None and read_hf_config(path).get("model_type") == "hylo":
        from megatron_hylo.serve.hf import HyloForCausalLM

        return load_foreign_model(HyloForCausalLM, path, dtype=torch.float32).eval()
    where = dict(gguf_file=gguf.name) if gguf else {}
    folder = gguf.parent if gguf else path
    return load_foreign_model(transformers.AutoModelForCausalLM, folder, dtype=torch.float32, **where).eval()


def load_transformers_tokenizer(path: str | Path) -> Any | None:
    """The tokenizer at `path` (Hugging Face folder or GGUF), or None where the folder has none."""
    _transformers()
    path = Path(path)
    gguf = gguf_file(path)
    if gguf:
        return _gguf_tokenizer(gguf)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    return load_foreign_tokenizer(path)


def _gguf_tokenizer(file: Path) -> Any:
    """The tokenizer inside a GGUF file, with two things set that transformers leaves out of it.

    The end-of-sequence token is the one the file names, and the file's pre-tokenizer "smollm" splits digits one by
    one before the byte-level split (235 of 721 documents tokenise differently without it).
    """
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer = load_foreign_tokenizer(file.parent, gguf_file=file.name)
    fields = GGUFReader(file).fields
    if "tokenizer.ggml.eos_token_id" in fields:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(fields["tokenizer.ggml.eos_token_id"].contents()))
    if "tokenizer.ggml.pre" in fields and fields["tokenizer.ggml.pre"].contents() == "smollm":
        split = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
        tokenizer.backend_tokenizer.pre_tokenizer = split
    return tokenizer


def open_source(path: str | Path) -> TensorSource:
    """Open a Hugging Face folder or a GGUF file (dequantised by transformers to float32).

    Raises:
        ConfigError: nothing readable is there, a shard is missing or corrupt, the architecture is unknown.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give a Hugging Face folder or a .gguf file")
    if gguf_file(path) is None:
        return SafetensorsSource(path)
    model = load_transformers_model(path)
    return StateDictSource(model_config_from_hf(model.config.to_dict()), model)
