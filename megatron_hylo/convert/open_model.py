"""Open any model as one of transformers: a model folder, training checkpoint, Hugging Face folder or GGUF file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from megatron_hylo.config import ConfigError
from megatron_hylo.convert.hf_reader import load_transformers_model, open_source
from megatron_hylo.convert.mapping import model_entries
from megatron_hylo.convert.source_path import check_model, read_hf_config
from megatron_hylo.convert.token_ids import generation_settings
from megatron_hylo.data.load_tokenizer import load_transformers_tokenizer
from megatron_hylo.hf import HyloConfig, HyloForCausalLM
from megatron_hylo.io import verify_manifest_if_any
from megatron_hylo.io.foreign import load_foreign_model
from megatron_hylo.io.gguf_file import gguf_file
from megatron_hylo.platform.distributed import device, session

if TYPE_CHECKING:
    from megatron_hylo.models.gather import GatheredModel
    from megatron_hylo.models.hylo_model import HyloModel


def open_model(path: str | Path, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Open a model and its tokenizer for inference, on this rank's device.

    Args:
        path: model folder, training checkpoint, Hugging Face folder (exported hybrid or teacher), or .gguf file.
        dtype: of the weights but those that a hybrid keeps in fp32; as they are stored by default (GGUF: fp32).

    Returns:
        (causal LM of transformers in eval mode, tokenizer of transformers).

    Raises:
        ConfigError: nothing that can be loaded is there, or it has no tokenizer.
        DamagedError: the folder was made here and is not what its manifest says.
    """
    path = Path(path)
    check_model(path)
    is_megatron = (path / "hylo.json").is_file()
    if not is_megatron:
        verify_manifest_if_any(path)
    source = path / "tokenizer" if is_megatron else path
    if is_megatron:
        model = model_from_megatron(path)
    elif gguf_file(path) is not None:
        model = load_transformers_model(path)
    elif read_hf_config(path).get("model_type") == HyloConfig.model_type:
        model = load_foreign_model(HyloForCausalLM, path, dtype="auto")
    else:
        model = load_foreign_model(AutoModelForCausalLM, path, dtype="auto")
    tokenizer = load_transformers_tokenizer(source)
    if tokenizer is None:
        raise ConfigError(f"{source} holds no tokenizer; copy the base model's tokenizer files there")
    if dtype is not None:
        cast_weights(model, dtype)
    torch.nn.Module.to(model, device())  # transformers' own is typed for its classes alone
    return model.eval(), tokenizer


def open_as_hybrid(path: str | Path, dtype: torch.dtype | None = None) -> tuple[HyloForCausalLM, Any]:
    """`open_model`, but of Llama, Mistral and Qwen too in the class of exported hybrids, with its caches of fixed size.

    Raises:
        ConfigError: as `open_model`, or an architecture that is not converted.
    """
    path = Path(path)
    if (path / "hylo.json").is_file() or (gguf_file(path) is None and read_hf_config(path).get("model_type") == "hylo"):
        return open_model(path, dtype)
    source = open_source(path)
    tokenizer = load_transformers_tokenizer(path)
    if tokenizer is None:
        raise ConfigError(f"{path} holds no tokenizer; copy the base model's tokenizer files there")
    names = [name for entry in model_entries(source.config) for name in entry.hugging_face]
    model = _filled(HyloConfig(hylo=source.config.to_dict(), dtype=source.dtype()), {name: source.read(name) for name in names})
    if gguf_file(path) is None:
        model.generation_config.eos_token_id = generation_settings(path, tokenizer).get("eos_token_id")
    if dtype is not None:
        cast_weights(model, dtype)
    torch.nn.Module.to(model, device())
    return model.eval(), tokenizer


def model_from_megatron(path: str | Path) -> HyloForCausalLM:
    """The Hugging Face model of a model folder or training checkpoint, in the folder's dtype, on the CPU."""
    # Megatron-Core takes seconds to import, which exported folders need not wait for.
    from megatron_hylo.models.checkpoint import load_model

    with session():
        return hf_model(load_model(path, backend="local"))


def hf_model(source: "HyloModel | GatheredModel") -> HyloForCausalLM:
    """The Hugging Face model of a whole Megatron model, or of one gathered from its ranks, in its dtype, on the CPU.

    Raises:
        ConfigError: a tensor holds NaN or infinite values.
    """
    from megatron_hylo.convert.to_hf import hf_tensors

    tensors = dict(hf_tensors(source))
    return _filled(HyloConfig(hylo=source.config.hylo.to_dict(), dtype=source.config.params_dtype), tensors)


def _filled(config: HyloConfig, tensors: dict[str, torch.Tensor]) -> HyloForCausalLM:
    """The model of a configuration with these tensors."""
    with torch.device("meta"):
        model = HyloForCausalLM(config)
    model.load_state_dict(tensors, strict=not model.config.tie_word_embeddings, assign=True)
    model.tie_weights()
    return model


@torch.no_grad()
def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Cast a model's parameters in place, but those that it keeps in fp32 (a hybrid's decays); buffers stay as they are."""
    kept = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] not in kept:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
