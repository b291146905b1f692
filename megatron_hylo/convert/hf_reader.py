"""Read a Hugging Face folder (safetensors, sharded or not), tensor by tensor; GGUF files are `gguf_reader`'s.

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
from megatron_hylo.convert.gguf_reader import GgufSource, gguf_fields, gguf_file
from megatron_hylo.convert.hf_config import model_config_from_hf
from megatron_hylo.convert.sentencepiece_tokenizer import load_sentencepiece_tokenizer
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


def _transformers() -> Any:
    """transformers, imported when it is needed (seconds) and without its progress bars."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_transformers_model(path: str | Path) -> Any:
    """The model at `path` (Hugging Face folder or GGUF) through transformers, fp32, eval mode: the oracle."""
    path = Path(path)
    if (gguf := gguf_file(path)) is not None:
        return _gguf_model(GgufSource(gguf))
    if read_hf_config(path).get("model_type") == "hylo":
        from megatron_hylo.serve.hf import HyloForCausalLM

        return HyloForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return _transformers().AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def _gguf_model(source: GgufSource) -> Any:
    """transformers' model of a GGUF file: weights as transformers reads them, RoPE compared with what the file's data says.

    transformers makes plain RoPE of every file, so it is given the configuration.

    Raises:
        ConfigError: the frequencies are others than the file's.
    """
    transformers = _transformers()
    values = {key: value for key, value in source.hf_config.items() if key not in ("rope_theta", "rope_scaling")}
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    folder, name = source.file.parent, source.file.name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, config=config, dtype=torch.float32).eval()
    found, wanted = model.model.rotary_emb.inv_freq, source.frequencies()
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-5, atol=0):
        raise ConfigError(
            f"transformers turns channels with frequencies {found.tolist()}, {source.file} says {wanted.tolist()}"
        )
    return model


def load_transformers_tokenizer(path: str | Path) -> Any | None:
    """The tokenizer at `path` (Hugging Face folder or GGUF), or None where the folder has none."""
    transformers = _transformers()
    path = Path(path)
    gguf = gguf_file(path)
    if gguf:
        return _gguf_tokenizer(gguf)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    if (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
        return load_sentencepiece_tokenizer(path)
    return transformers.AutoTokenizer.from_pretrained(path)


def _gguf_tokenizer(file: Path) -> Any | None:
    """The tokenizer inside a GGUF file (None: it has none), with two things set that transformers leaves out of it.

    The end-of-sequence token is the one the file names, and the file's pre-tokenizer "smollm" splits digits one by
    one before the byte-level split (235 of 721 documents tokenise differently without it).
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    fields = gguf_fields(file)
    if "tokenizer.ggml.tokens" not in fields:
        return None
    tokenizer = _transformers().AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if "tokenizer.ggml.eos_token_id" in fields:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(fields["tokenizer.ggml.eos_token_id"].contents()))
    if "tokenizer.ggml.pre" in fields and fields["tokenizer.ggml.pre"].contents() == "smollm":
        split = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
        tokenizer.backend_tokenizer.pre_tokenizer = split
    return tokenizer


def open_source(path: str | Path) -> TensorSource:
    """Open a Hugging Face folder or a GGUF file (dequantised to float32).

    Raises:
        ConfigError: nothing readable is there, a shard is missing or corrupt, the architecture is unknown.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give a Hugging Face folder or a .gguf file")
    gguf = gguf_file(path)
    return SafetensorsSource(path) if gguf is None else GgufSource(gguf)
