"""Checks that every tensor of a source is used or known to be harmless; any other is refused."""

import re
from collections.abc import Collection
from pathlib import Path

from megatron_hylo.config import ConfigError, ModelConfig

# tables of the rotation and of positions, which old transformers stored and every version computes from config.json
HARMLESS = re.compile(r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids)$")
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
MERGE = "merge it into the weights first (PEFT's merge_and_unload, then save_pretrained)"


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
