"""Quantised weights of exported models: which maps are quantised, what a loaded folder must hold, maps with FP8 weights.

compressed-tensors' folders are dequantised as they are loaded, into plain maps in the model's dtype, so that every way of
calling the model computes with the weights that the folder means. Maps with FP8 weights in memory are made of a loaded model.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# linear maps of mixers and MLPs by their last name; MLA's kv_b_proj, which decoding absorbs, and small maps to gates stay
QUANTISED = frozenset({
    "gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj", "g_proj", "q_a_proj", "q_b_proj",
    "kv_a_proj_with_mqa", "in_proj", "out_proj",
})  # fmt: skip
SCALES = ("_scale", "_scale_inv", "_packed", "_zero_point", "_global_scale", "qweight", "qzeros", "SCB", "absmax")
LARGEST_FP8 = 448.0  # of e4m3


def quantised_linears(model: nn.Module, kept: Collection[str] = ()) -> dict[str, nn.Linear]:
    """Return the linear maps that a quantisation rounds, by name, without those of the last names `kept`."""
    wanted = QUANTISED.difference(kept)
    found = ((name, module) for name, module in model.named_modules() if name.rpartition(".")[2] in wanted)
    return {name: module for name, module in found if isinstance(module, nn.Linear)}


def check_declared(quantised: Any) -> None:
    """Refuse weights quantised by a method that transformers does not know: it would load the numbers without their scales.

    Args:
        quantised: `quantization_config` of a configuration; settings of a quantisation while loading pass.

    Raises:
        ValueError: such a method.
    """
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    if method is None:
        return
    from transformers.quantizers.auto import AutoHfQuantizer

    if AutoHfQuantizer.supports_quant_method(quantised):
        return
    maker = "nvidia-modelopt" if method == "modelopt" else f"the method {method!r}"
    raise ValueError(
        f"the folder's weights are quantised by {maker}, whose scales transformers does not read: the numbers alone would give "
        f"nonsense. Export the model with --quantize, or quantise it as it is loaded (quantization_config)"
    )


def check_loaded(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse a loaded model whose scales were left in the folder, or are not there.

    Args:
        missing, unexpected: names of tensors, as transformers reports them.

    Raises:
        ValueError: there are such names.
    """
    left = sorted(name for name in unexpected if name.endswith(SCALES))
    absent = sorted(name for name in missing if name.endswith(SCALES))
    if left:
        raise ValueError(
            f"the folder holds {left[0]} and {len(left) - 1} more tensors of quantised weights, but its config.json does not "
            f"say how to read them (quantization_config): the numbers alone would give nonsense. Download or export it again"
        )
    if absent:
        raise ValueError(f"the folder is quantised, but {absent[0]} is not in it ({len(absent)} missing); export it again")


def make_plain(model: nn.Module) -> None:
    """Turn what compressed-tensors has loaded into plain maps in the model's dtype, and forget the quantisation.

    Left as they are, weights would be dequantised by the first call of the whole model, not by one of its parts, and code that
    reads a weight in place of calling its map would read values without scales.

    Raises:
        ImportError: compressed-tensors is not installed.
        ValueError: weights are offloaded to memory or disk.
    """
    modules = [module for module in model.modules() if getattr(module, "quantization_scheme", None) is not None]
    if not modules:
        return
    try:  # transformers refuses files of a model whose imports fail, unless they are tried
        from compressed_tensors.compressors import decompress_module
    except ImportError as error:
        raise ImportError("weights quantised by compressed-tensors need it: pip install compressed-tensors") from error
    for module in modules:
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            raise ValueError(
                "a quantised folder cannot be offloaded to memory or disk: load it without device_map, or on GPUs alone"
            )
        decompress_module(module)  # not that of the whole model, which wraps every module for offloading
        for name in [n for n, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]]:
            if name not in ("weight", "bias"):
                delattr(module, name)
        for name in ("quantization_scheme", "quantization_status", "forward"):
            vars(module).pop(name, None)
        module.weight = nn.Parameter(module.get_parameter("weight").detach())
    loaded: Any = model
    loaded.hf_quantizer.compressor.remove_decompression_hook(model)
    for owner, name in ((loaded.config, "quantization_config"), (loaded, "hf_quantizer"), (loaded, "quantization_method")):
        vars(owner).pop(name, None)
    loaded.is_quantized = False


class HyloScaledLinear(nn.Module):
    """Linear map with weights in FP8 (e4m3) and a power of two as the scale of each row.

    One vector on a GPU is multiplied with the values as they are; for more, the weight is made in the input's dtype, exactly.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        largest = weight.abs().amax(1).clamp(min=1e-30)
        scale = torch.exp2((largest / LARGEST_FP8).log2().ceil())
        self.weight = nn.Parameter((weight / scale[:, None]).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)  # fp32 [rows]
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map to x: [..., columns] -> [..., rows]."""
        return F.linear(x, self.weight.to(x.dtype) * self.weight_scale[:, None].to(x.dtype), self.bias)


def keep_weights_in_fp8(model: nn.Module) -> None:
    """Replace the maps of mixers and MLPs by ones with FP8 weights, each rounded to the nearest value.

    Those of a folder exported with `--quantize fp8` are not changed by it: their scales are powers of two as well.
    """
    for name, linear in quantised_linears(model).items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, HyloScaledLinear(linear))
