"""Every tensor of a source is used, or known and harmless, or refused: nothing that was trained is left out unsaid."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.tensor_names import tensor_names

# tables of the rotation and of positions, which old transformers stored and every version computes from config.json
HARMLESS = re.compile(r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids)$")
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
MERGE = "merge it into the weights first (PEFT's merge_and_unload, then save_pretrained)"
# Hugging Face's name of a layer's part -> llama.cpp's
GGUF_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GGUF_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
GGUF_READ_WITH_CONFIG = {"rope_freqs.weight"}  # factors of a scaled RoPE


def refuse_unused(where: Path, unused: Collection[str], config: ModelConfig) -> None:
    """Refuse a source with tensors that its configuration does not ask for.

    Args:
        where: folder or file, for the message.
        unused: names of tensors that are neither used nor harmless.
        config: what its configuration asks for.

    Raises:
        ConfigError: there are some; it says which and, where that can be told, why.
    """
    if not unused:
        return
    first = sorted(unused)[0]
    layers = [int(found[1]) for name in unused if (found := re.search(r"(?:^|\.)(?:layers|blk)\.(\d+)\.", name))]
    if any("lora_" in name or ".modules_to_save." in name for name in unused):
        why = f"they belong to an adapter; {MERGE}"
    elif layers and max(layers) >= config.num_hidden_layers:
        why = (
            f"its configuration has {config.num_hidden_layers} layers, the weights have layer {max(layers)}; correct "
            "num_hidden_layers, or remove them from the file where they are not needed (multi-token prediction)"
        )
    elif all("scale" in name or "zero_point" in name or name.endswith("SCB") for name in unused):
        why = "they are scales of weights that are not stored as 8-bit values; download the checkpoint again"
    else:
        kind = "biases" if all(name.endswith(".bias") for name in unused) else "them"
        why = f"correct the configuration if the model was trained with {kind}, or remove them from the file"
    raise ConfigError(
        f"{where} holds {len(unused)} tensors that its configuration does not ask for and that would be lost "
        f"({first}{', ...' if len(unused) > 1 else ''}): {why}"
    )


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder with an adapter beside (or in place of) the weights.

    Raises:
        ConfigError: there is one.
    """
    for name in ADAPTERS:
        if (folder / name).exists():
            raise ConfigError(f"{folder} holds an adapter ({name}), which would be lost: {MERGE}, or remove its files")


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor.

    Raises:
        KeyError: of a tensor that no GGUF file has.
    """
    stem, _, kind = name.rpartition(".")
    if stem in GGUF_OUTSIDE:
        return f"{GGUF_OUTSIDE[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_PARTS[part]}.{kind}"


def check_gguf_names(file: Path, config: ModelConfig, stored: Mapping[str, tuple[int, ...]]) -> None:
    """Compare a GGUF file's tensors with what its metadata ask for: transformers passes over what it does not know.

    Args:
        file: for messages.
        config: from its metadata.
        stored: tensor names -> shapes, [out, in] as Hugging Face's.

    Raises:
        ConfigError: a tensor is missing, has another shape, or would be lost.
    """
    wanted = {gguf_name(name): (name, shape) for name, shape in tensor_names(config).items()}
    for ours, (name, shape) in wanted.items():
        if ours not in stored:
            raise ConfigError(
                f"{file} has no tensor {ours} ({name}), which its metadata ask for; is it one part of a split file?"
            )
        if stored[ours] != shape:
            raise ConfigError(f"{file}: tensor {ours} has shape {list(stored[ours])}, its metadata ask for {list(shape)}")
    refuse_unused(file, set(stored) - set(wanted) - GGUF_READ_WITH_CONFIG, config)
