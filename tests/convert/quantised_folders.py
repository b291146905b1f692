"""Quantised Hugging Face folders as the tools that write them lay them out, and the weights they stand for by the formula."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Stored = tuple[dict[str, Tensor], Tensor]  # tensors by the end of their name, the weight in float32
FLOAT8_MAX = 448.0


def formula(value: Tensor, scale: Tensor, block: tuple[int, int], zero: Tensor | None = None, divide: float = 1.0) -> Tensor:
    """(value - zero) * scale / divide in float64; scale and zero are [rows / block, columns / block], the last ones cut off."""
    rows, columns = (np.arange(size) // width for size, width in zip(value.shape, block))
    at = np.ix_(rows, columns)
    offset = 0.0 if zero is None else zero.double().numpy()[at]
    return torch.from_numpy((value.double().numpy() - offset) * scale.double().numpy()[at] / divide).float()


def scaled(weight: Tensor, block: tuple[int, int], limit: float, dtype: torch.dtype, scale_dtype: torch.dtype) -> Stored:
    """`weight` as values up to `limit` and one scale a block."""
    rows, columns = weight.shape
    scale = torch.empty(-(-rows // block[0]), -(-columns // block[1]), dtype=scale_dtype)
    value = torch.empty_like(weight)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            here = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale[i, j] = weight[here].abs().max() / limit
            value[here] = weight[here] / scale[i, j].float()
    value = value.round().to(dtype) if dtype == torch.int8 else value.to(dtype)
    return {"weight": value, "scale": scale}, formula(value, scale, block)


def float8(
    scale: str,
    block: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    shape: tuple | None = None,
    **more: Tensor,
) -> Callable[[Tensor], Stored]:
    """float8 with one scale for the whole (block None) or a block; `more` are further tensors."""

    def store(weight: Tensor) -> Stored:
        found, right = scaled(weight, block or tuple(weight.shape), FLOAT8_MAX, torch.float8_e4m3fn, dtype)
        found[scale] = found.pop("scale") if shape is None else found.pop("scale").reshape(shape)
        return found | more, right

    return store


def int8(block: tuple[int, int] | None = None, asymmetric: bool = False) -> Callable[[Tensor], Stored]:
    """compressed-tensors int8 of rows or groups, with zero points or without."""

    def store(weight: Tensor) -> Stored:
        size = block or (1, weight.shape[1])
        found, right = scaled(weight, size, 120.0 if asymmetric else 127.0, torch.int8, torch.bfloat16)
        found["weight_scale"] = found.pop("scale")
        if asymmetric:
            zero = torch.randint(-6, 7, found["weight_scale"].shape, dtype=torch.int8)
            found["weight_zero_point"] = zero
            right = formula(found["weight"], found["weight_scale"], size, zero)
        return found, right

    return store


def bitsandbytes(weight: Tensor) -> Stored:
    """LLM.int8: rows scaled by their largest value."""
    largest = weight.abs().amax(1)
    value = (weight / largest[:, None] * 127).round().to(torch.int8)
    stored = {"weight": value, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, formula(value, largest[:, None], (1, weight.shape[1]), divide=127.0)


def quantise_folder(
    folder: Path, store: Callable[[Tensor], Stored], declared: dict | None, only: str = "_proj.weight"
) -> dict[str, Tensor]:
    """Replace the linear weights of a folder that transformers saved; returns all right weights in float32."""
    tensors, right, file = load_file(folder / "model.safetensors"), {}, folder / "model.safetensors"
    written = {}
    for name, tensor in tensors.items():
        right[name] = tensor.float()
        if name.endswith(only):
            stored, right[name] = store(tensor.float())
            written |= {name.removesuffix("weight") + end: t.contiguous().clone() for end, t in stored.items()}
        else:
            written[name] = tensor
    save_file(written, file, metadata={"format": "pt"})
    if declared is not None:
        declare(folder, declared)
    return right


def declare(folder: Path, declared: dict) -> None:
    """Put a quantization_config into config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": declared}))


def compressed_tensors(kind: str, **weights: object) -> dict:
    """quantization_config of compressed-tensors for all linear maps but the head."""
    scheme = {"num_bits": 8, "type": "int" if kind.startswith("int") else "float", "symmetric": True} | weights
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": {"num_bits": 8, "dynamic": True}}
    return {
        "quant_method": "compressed-tensors", "format": kind, "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }  # fmt: skip
