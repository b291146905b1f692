"""Models whose linear maps compute in FP8, by Transformer Engine; all else of them stays in its own precision.

A frozen one in E4M3; one that is trained "hybrid": gradients, whose range is wider, in E5M2. Each tensor is scaled by its own
largest value ("tensorwise", current scaling). That needs no history: delayed scaling learns its scales in passes with
gradients, which a frozen model has none of. Blocks with a scale each make slower products on Hopper.
"""

import torch
from megatron.core.fp8_utils import TE_LINEAR_TYPES
from torch import nn

from megatron_hylo.config import ConfigError, Fp8
from megatron_hylo.models.specs import BackendName, get_backend

CAPABILITY = (8, 9)  # of the first GPUs with FP8 products
ROWS, COLUMNS = 8, 16  # what a matrix's sizes must be multiples of; tokens are rows, in a weight's gradient columns
INSTEAD = "or compute in bf16 (teacher_precision and linear_precision same)"


def check_fp8(backend: BackendName = "auto") -> None:
    """Refuse FP8 where it cannot run.

    Args:
        backend: where linear maps would come from.

    Raises:
        ConfigError: no GPU, or one without FP8; linear maps that are not Transformer Engine's.
    """
    needed = ".".join(map(str, CAPABILITY))
    if not torch.cuda.is_available():
        raise ConfigError(f"fp8 needs a GPU, there is none here; use one of compute capability {needed} or later, {INSTEAD}")
    if (found := get_backend(backend).name) != "te":
        why = "Transformer Engine does not import here" if backend == "auto" else f"backend {backend} was asked for"
        raise ConfigError(f"fp8 needs backend te, not {found}: {why}; install Transformer Engine, use backend te, {INSTEAD}")
    if (capability := torch.cuda.get_device_capability()) < CAPABILITY:
        here = f"{torch.cuda.get_device_name()} has {'.'.join(map(str, capability))}"
        raise ConfigError(f"fp8 needs a GPU of compute capability {needed} or later, {here}; use another, {INSTEAD}")


def check_fp8_widths(model: nn.Module, fp8: Fp8 = "e4m3") -> None:
    """Refuse linear maps of sizes that FP8 products do not take.

    Args:
        model: this rank's part.
        fp8: a map that is trained multiplies with its weight's transpose as well.

    Raises:
        ConfigError: naming the linear map and its sizes.
    """
    rows = COLUMNS if fp8 == "hybrid" else ROWS
    for name, module in model.named_modules():
        if isinstance(module, TE_LINEAR_TYPES):
            outputs, inputs = module.weight.shape
            if outputs % rows or inputs % COLUMNS:
                raise ConfigError(
                    f"fp8 needs linear maps whose inputs are a multiple of {COLUMNS} and outputs one of {rows}; {name} has "
                    f"{inputs} and {outputs} on this rank; change tensor_model_parallel_size, {INSTEAD}"
                )


@torch.no_grad()
def keep_fp8_weights(model: nn.Module) -> None:
    """Replace the weights of all linear maps by their FP8 values for good: quantised once, half of bf16's memory.

    Without it Transformer Engine keeps what it quantised at the first pass beside the bf16 weights.

    Args:
        model: this rank's part, built with `fp8` "e4m3" and loaded; from here on for forward passes alone.
    """
    from transformer_engine.pytorch import DType, Float8CurrentScalingQuantizer

    for module in model.modules():
        if isinstance(module, TE_LINEAR_TYPES):
            # columnwise: a transposed copy, for backward passes
            quantizer = Float8CurrentScalingQuantizer(DType.kFloat8E4M3, module.weight.device, rowwise=True, columnwise=False)
            module.weight = nn.Parameter(quantizer(module.weight), requires_grad=False)
