"""Tiny GGUF files out of transformers models, as llama.cpp's converter lays them out."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers


def llama3_factors(rope: dict[str, Any], dim: int) -> torch.Tensor:
    """rope_freqs.weight of a Llama 3: plain frequencies over those of transformers, fp32 [dim / 2]."""
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)
    config = transformers.LlamaConfig(head_dim=dim, max_position_embeddings=10**6, rope_parameters=rope)
    return plain / transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]


def write_gguf(
    file: Path,
    model: Any,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
    without: tuple[str, ...] = (),
    quantize: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """Write a model's weights and sizes.

    Args:
        file: where.
        model: LlamaForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM.
        keys: further keys after the architecture's name (or whole ones, with a leading "/"), or others' values.
        tensors: further tensors.
        without: keys and tensors to leave out.
        quantize: of the matrices.
    """
    c = model.config
    arch = c.model_type
    writer = gguf.GGUFWriter(file, arch)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    sizes = {
        "block_count": c.num_hidden_layers, "context_length": c.max_position_embeddings, "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size, "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads, "attention.key_length": head_dim,
        "attention.value_length": head_dim, "attention.layer_norm_rms_epsilon": c.rms_norm_eps, "vocab_size": c.vocab_size,
        "rope.dimension_count": head_dim, "rope.freq_base": float(c.rope_parameters["rope_theta"]),
    }  # fmt: skip
    for key, value in (sizes | (keys or {})).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if key not in without:
            name = key[1:] if key.startswith("/") else f"{arch}.{key}"
            add.get(type(value), writer.add_array)(name, value)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), c.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        stored = f"{names.get_name(module)}.{kind}"
        if stored in without or (stored == "output.weight" and c.tie_word_embeddings):
            continue
        if arch == "llama" and module.endswith(("q_proj", "k_proj")):  # llama.cpp turns neighbouring channels
            tensor = tensor.reshape(-1, 2, head_dim // 2, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        data = tensor.float().numpy()
        if quantize is not None and data.ndim == 2 and data.shape[-1] % 32 == 0:
            writer.add_tensor(stored, gguf.quantize(data, quantize), raw_dtype=quantize)
        else:
            writer.add_tensor(stored, np.ascontiguousarray(data))
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
