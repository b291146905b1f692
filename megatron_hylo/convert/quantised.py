"""Weights stored as 8-bit values with scales: the folder's declaration, and dequantisation to float32.

| declared by | stored | weight |
|---|---|---|
| `quant_method: fp8` (DeepSeek, Qwen3-FP8, AutoFP8), `fbgemm_fp8`, ModelOpt's FP8, compressed-tensors `float-quantized` | \
float8 + `weight_scale_inv` or `weight_scale` of the tensor, of its rows or of its blocks | value * scale |
| compressed-tensors `int-quantized` | int8 + `weight_scale` [+ `weight_zero_point`] | (value - zero point) * scale |
| bitsandbytes, `load_in_8bit` | int8 + `SCB` of the rows | value * SCB / 127 |

Products are made in float32, which holds them exactly where scales are bfloat16 or powers of two, and rounds once otherwise.
Activations that were quantised when the model ran (`input_scale`, `k_scale`) say nothing about the weights.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_hylo.config import ConfigError

MODELOPT_CONFIG = "hf_quant_config.json"
INSTEAD = "convert the model's unquantised (bf16) release, or dequantise it first with the tool that quantised it"
READ = "float8 and int8 of fp8, fbgemm_fp8, modelopt FP8, compressed-tensors and bitsandbytes 8-bit"
STORED_DTYPES = ("F8_E4M3", "F8_E5M2", "I8")  # as safetensors names them
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
SCALES = ("weight_scale_inv", "weight_scale", "SCB")
ZERO_POINT = "weight_zero_point"
# of activations and of the KV cache, and bitsandbytes' note that rows are stored as rows
HARMLESS = re.compile(r"\.(input_scale|input_zero_point|activation_scale|output_scale|[qkv]_scale|kv_scale|weight_format)$")
BNB_INVERSE_127 = 7.874015718698502e-3  # as bitsandbytes multiplies


@dataclass(frozen=True)
class Quantisation:
    """A folder's declaration of its quantised weights."""

    method: str
    block: tuple[int, int] | None = None  # rows and columns of a block, where scales belong to blocks


def read_quantisation(folder: Path, values: Mapping[str, Any]) -> Quantisation | None:
    """Read the declaration from config.json or ModelOpt's hf_quant_config.json; None for a folder that is not quantised.

    Args:
        folder: the Hugging Face folder.
        values: its config.json.

    Raises:
        ConfigError: a format that is not read, or a declaration that is no such thing.
    """
    declared = values.get("quantization_config") or values.get("compression_config")
    if declared is None and (folder / MODELOPT_CONFIG).is_file():
        file = folder / MODELOPT_CONFIG
        try:
            declared = {"quant_method": "modelopt", **json.loads(file.read_text())["quantization"]}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} is not ModelOpt's ({error!r}); download the checkpoint again") from error
    if declared is None:
        return None
    if not isinstance(declared, Mapping):
        raise ConfigError(f"{folder}: config.json: quantization_config is {declared!r}; it must be a mapping")
    method = declared.get("quant_method") or ("compressed-tensors" if "config_groups" in declared else None)
    if method is None and declared.get("load_in_8bit"):
        method = "bitsandbytes"
    if method not in _METHODS:
        raise _refused(folder, f"quant_method {method!r}")
    return _METHODS[method](folder, method, declared)


def _refused(folder: Path, what: str) -> ConfigError:
    return ConfigError(f"{folder} is quantised in a way that is not read: {what}; {INSTEAD} (read are {READ})")


def _fp8(folder: Path, method: str, declared: Mapping[str, Any]) -> Quantisation:
    block = declared.get("weight_block_size")
    return Quantisation(method, _pair(block) if block else None)


def _modelopt(folder: Path, method: str, declared: Mapping[str, Any]) -> Quantisation:
    algorithm = declared.get("quant_algo")
    if algorithm not in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", None):
        raise _refused(folder, f"ModelOpt's quant_algo {algorithm}")
    return Quantisation(method)


def _bitsandbytes(folder: Path, method: str, declared: Mapping[str, Any]) -> Quantisation:
    if not declared.get("load_in_8bit", declared.get("_load_in_8bit")):
        raise _refused(folder, "bitsandbytes with 4 bits")
    return Quantisation(method)


def _compressed_tensors(folder: Path, method: str, declared: Mapping[str, Any]) -> Quantisation:
    groups = list((declared.get("config_groups") or {}).values())
    formats = {group.get("format") or declared.get("format") for group in groups}
    if unread := formats - {"float-quantized", "int-quantized", "naive-quantized"}:
        raise _refused(folder, f"compressed-tensors format {min(map(str, unread))}")
    if (declared.get("sparsity_config") or {}).get("format") not in (None, "dense"):
        raise _refused(folder, "compressed-tensors with a sparse format")
    if (declared.get("transform_config") or {}).get("config_groups"):
        raise _refused(folder, "compressed-tensors with transforms of the activations")
    blocks = set()
    for weights in (group.get("weights") or {} for group in groups):
        if weights.get("num_bits") != 8:
            raise _refused(folder, f"compressed-tensors with {weights.get('num_bits')} bits")
        if weights.get("strategy") == "block":
            structure = weights.get("block_structure")
            blocks.add(_pair(structure.split("x") if isinstance(structure, str) else structure))
        elif weights.get("strategy") in ("group", "tensor_group"):
            blocks.add((1, int(weights["group_size"])))
    if len(blocks) > 1:
        raise _refused(folder, f"compressed-tensors with blocks of several sizes ({sorted(blocks)})")
    return Quantisation(method, blocks.pop() if blocks else None)


_METHODS: dict[str, Callable[[Path, str, Mapping[str, Any]], Quantisation]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "modelopt": _modelopt,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
}


def _pair(values: Any) -> tuple[int, int]:
    rows, columns = (int(v) for v in values)
    return rows, columns


@dataclass(frozen=True)
class Scaled:
    """A quantised weight: its stored tensors, and the block that one scale covers (None: tensor or row)."""

    weight: str
    scale: str
    zero_point: str | None
    block: tuple[int, int] | None

    def names(self) -> list[str]:
        """Return the names of the stored tensors."""
        return [self.weight, self.scale] + ([self.zero_point] if self.zero_point else [])

    def read(self, read: Callable[[str], Tensor]) -> Tensor:
        """Dequantise the weight to float32, [rows, columns].

        Args:
            read: name -> stored tensor.
        """
        value, scale = read(self.weight).float(), read(self.scale).float()
        if self.zero_point is not None:
            value = value - self._spread(read(self.zero_point).float(), value)
        value = value * self._spread(scale, value)
        return value * BNB_INVERSE_127 if self.scale.endswith("SCB") else value

    def _spread(self, scale: Tensor, value: Tensor) -> Tensor:
        """Expand `scale` to multiply a [rows, columns] value; blocks at the edges may be cut off."""
        rows, columns = value.shape
        if scale.numel() == 1:
            return scale.reshape(1, 1)
        if self.block is None:
            return scale.reshape(rows, 1)
        return scale.repeat_interleave(self.block[0], 0)[:rows].repeat_interleave(self.block[1], 1)[:, :columns]

    def is_cut_off(self, shape: tuple[int, ...]) -> bool:
        """Whether blocks at the edges are smaller; transformers divides the matrix evenly then, which is another weight."""
        return self.block is not None and any(size > width and size % width for size, width in zip(shape, self.block))


def find_scaled(
    folder: Path, quantisation: Quantisation | None, stored: Mapping[str, tuple[str, tuple[int, ...]]]
) -> dict[str, Scaled]:
    """Find all quantised weights of a folder by name.

    Args:
        folder: for messages.
        quantisation: what the folder declares.
        stored: every tensor's (safetensors dtype, shape).

    Raises:
        ConfigError: 8-bit weights that no declaration explains, without a scale, or with one of an unknown shape.
    """
    found = {}
    for name, (dtype, shape) in stored.items():
        if dtype not in STORED_DTYPES or not name.endswith(".weight"):
            continue
        if quantisation is None:
            raise ConfigError(
                f"{folder}: {name} is stored as {dtype}, but neither config.json (quantization_config) nor {MODELOPT_CONFIG} "
                f"says how it was quantised; {INSTEAD}"
            )
        stem = name.removesuffix("weight")
        scales = [stem + scale for scale in SCALES if stem + scale in stored]
        if len(scales) != 1:
            raise ConfigError(
                f"{folder}: {name} is stored as {dtype} with {' and '.join(scales) or 'no scale'}; exactly one of "
                f"{', '.join(SCALES)} tells its weight; download the checkpoint again"
            )
        zero_point = stem + ZERO_POINT if stem + ZERO_POINT in stored else None
        block = _block_of(folder, name, shape, scales[0], *stored[scales[0]], quantisation.block)
        if zero_point and stored[zero_point][1] != stored[scales[0]][1]:
            raise ConfigError(f"{folder}: {zero_point} has shape {list(stored[zero_point][1])}, its scale another")
        found[name] = Scaled(name, scales[0], zero_point, block)
    return found


def _block_of(
    folder: Path,
    name: str,
    shape: tuple[int, ...],
    scale: str,
    dtype: str,
    scale_shape: tuple[int, ...],
    block: tuple[int, int] | None,
) -> tuple[int, int] | None:
    """Return the block that one scale covers, None where that is the tensor or a row."""
    if dtype in SCALE_DTYPES and len(shape) == 2:
        if scale_shape in ((), (1,), (1, 1), (shape[0],), (shape[0], 1)):
            return None
        if block is not None and scale_shape == tuple(-(-size // width) for size, width in zip(shape, block)):
            return block
    raise ConfigError(
        f"{folder}: {scale} is {dtype} of shape {list(scale_shape)}, which fits neither {name} of shape {list(shape)} as a "
        f"whole, nor its rows, nor blocks of {list(block) if block else 'a declared size (none is declared)'}; {INSTEAD}"
    )
