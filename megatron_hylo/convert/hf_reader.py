"""Open a Hugging Face folder (`safetensors_reader`) or a GGUF file (`gguf_reader`), and load the same through transformers."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.convert.foreign import load_foreign_model, load_foreign_tokenizer
from megatron_hylo.convert.gguf_reader import GgufSource, gguf_fields, gguf_file
from megatron_hylo.convert.safetensors_reader import SafetensorsSource, read_hf_config
from megatron_hylo.convert.sentencepiece_tokenizer import load_sentencepiece_tokenizer
from megatron_hylo.io import verify_if_sealed


class TensorSource(Protocol):
    """Where converted tensors come from."""

    config: ModelConfig

    def read(self, name: str) -> Tensor:
        """The whole tensor of that Hugging Face name, on the CPU, without rounding: in bfloat16 or float32."""
        ...

    def dtype(self) -> torch.dtype:
        """bfloat16 where that is what every weight is stored in, else float32."""
        ...


def load_transformers() -> Any:
    """transformers, imported when it is needed (seconds) and without its progress bars."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_transformers_model(path: str | Path, **settings: Any) -> Any:
    """The model at `path` (Hugging Face folder or GGUF) through transformers, fp32, eval mode: the oracle.

    Args:
        path: folder or file.
        settings: further ones of `from_pretrained`, whose result is returned as it is where they are given; not for GGUF.
    """
    path = Path(path)
    if (gguf := gguf_file(path)) is not None:
        return _gguf_model(GgufSource(gguf))
    if read_hf_config(path).get("model_type") == "hylo":
        from megatron_hylo.hf import HyloForCausalLM as model_class
    else:
        model_class = load_transformers().AutoModelForCausalLM
    loaded = load_foreign_model(model_class, path, dtype=torch.float32, **settings)
    return loaded if settings else loaded.eval()


def _gguf_model(source: GgufSource) -> Any:
    """transformers' model of a GGUF file: weights as transformers reads them, RoPE compared with what the file's data says.

    transformers makes plain RoPE of every file, so it is given the configuration.

    Raises:
        ConfigError: the frequencies are others than the file's.
    """
    transformers = load_transformers()
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
    load_transformers()
    path = Path(path)
    gguf = gguf_file(path)
    if gguf:
        return _gguf_tokenizer(gguf)
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    if (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
        return load_sentencepiece_tokenizer(path)
    return load_foreign_tokenizer(path)


def _gguf_tokenizer(file: Path) -> Any | None:
    """The tokenizer inside a GGUF file (None: it has none), with two things set that transformers leaves out of it.

    The end-of-sequence token is the one the file names, and the file's pre-tokenizer "smollm" splits digits one by
    one before the byte-level split (235 of 721 documents tokenise differently without it).
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    fields = gguf_fields(file)
    if "tokenizer.ggml.tokens" not in fields:
        return None
    tokenizer = load_foreign_tokenizer(file.parent, gguf_file=file.name)
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
        DamagedError: a folder that was exported here is not what its manifest says.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give a Hugging Face folder or a .gguf file")
    verify_if_sealed(path)
    gguf = gguf_file(path)
    return SafetensorsSource(path) if gguf is None else GgufSource(gguf)
