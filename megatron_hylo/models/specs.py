"""Layer specs for Megatron-Core's HybridModel, in two backends that build the same state dict.

`local` needs nothing but torch and Megatron-Core; `te` takes linear maps and SwiGLU from Transformer Engine.
The mixers and norms are ours in both.
"""

import functools
import logging
from dataclasses import dataclass
from typing import Any, Callable, Literal

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_hylo.config import ConfigError
from megatron_hylo.config.mixers import complete
from megatron_hylo.models.attention import GroupedQueryAttention, WindowAttention
from megatron_hylo.models.gdn import GatedDeltaNet
from megatron_hylo.models.kda import KimiDeltaAttention
from megatron_hylo.models.layers import ResidualRMSNorm, RMSNorm
from megatron_hylo.models.mamba2 import Mamba2
from megatron_hylo.models.mixer import Mixer, MixerSubmodules
from megatron_hylo.models.mla import MultiLatentAttention
from megatron_hylo.models.recompute import FeedForwardLayer, MixerLayer
from megatron_hylo.models.transformer_config import HyloTransformerConfig

BackendName = Literal["auto", "local", "te"]
logger = logging.getLogger("megatron_hylo.models")


@dataclass(frozen=True)
class Backend:
    """Classes of the linear maps and of the MLP's SwiGLU."""

    name: str
    column_parallel_linear: Callable[..., torch.nn.Module]
    row_parallel_linear: Callable[..., torch.nn.Module]
    activation: Callable[..., torch.nn.Module] | None  # None: Megatron-Core's own function


def get_backend(name: BackendName = "auto") -> Backend:
    """The backend of that name; "auto" is `te` on a GPU with Transformer Engine, else `local`.

    Raises:
        ConfigError: an unknown name, or `te` where Transformer Engine does not import.
    """
    from megatron.core.extensions import transformer_engine as te

    if name not in ("auto", "local", "te"):
        raise ConfigError(f"unknown backend {name!r}; use auto, local or te")
    if name == "te" and not te.HAVE_TE:
        raise ConfigError("backend te needs Transformer Engine, which does not import here; install it or use backend local")
    use_te = te.HAVE_TE and (name == "te" or (name == "auto" and torch.cuda.is_available()))
    if use_te:
        chosen = Backend("te", te.TEColumnParallelLinear, te.TERowParallelLinear, te.TEActivationOp)
    else:
        chosen = Backend("local", ColumnParallelLinear, RowParallelLinear, None)
    _log_once(chosen.name)
    return chosen


@functools.cache
def _log_once(name: str) -> None:
    logger.info("linear maps and SwiGLU: backend %s", name)


class HyloStack(HybridStack):
    """HybridStack with our final norm; the stock one exists in Transformer Engine only."""

    def __init__(self, config: Any, submodules: HybridStackSubmodules, **kwargs: Any) -> None:
        super().__init__(config=config, submodules=submodules, post_layer_norm=False, **kwargs)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)


MIXER_CLASSES: dict[str, type[Mixer]] = {
    mixer.symbol: mixer
    for mixer in (
        GroupedQueryAttention, MultiLatentAttention, Mamba2, GatedDeltaNet, KimiDeltaAttention, WindowAttention,
    )
}  # fmt: skip
complete(MIXER_CLASSES, "models/specs.py: MIXER_CLASSES")


class PatternMixer:
    """Builds the mixer that the layer's place in the pattern asks for; arguments as those of `Mixer`.

    A class, since Megatron-Core's specs do not call functions.
    """

    def __new__(cls, config: HyloTransformerConfig, layer_number: int = 1, **kwargs: Any) -> Mixer:
        """Return the mixer itself, of the class of layer `layer_number`, counted from 1 with the MLPs between."""
        mixer = MIXER_CLASSES[config.hylo.mixers[(layer_number - 1) // 2]]
        return mixer(config=config, layer_number=layer_number, **kwargs)


def megatron_pattern(pattern: str) -> str:
    """Pattern for Megatron-Core's HybridModel: `*` for every mixer, since `PatternMixer` reads the model's own; its own MLPs.

    HybridModel knows no other mixers than its own and refuses some of their mixtures.
    """
    return "".join("*" if symbol in MIXER_CLASSES else symbol for symbol in pattern)


def hybrid_stack_spec(backend: Backend) -> ModuleSpec:
    """Spec of a stack of mixer layers, `-` MLP layers and `E` layers of experts.

    All mixers sit in the same place, `layers.{i}.self_attention` behind `layers.{i}.input_layernorm`. Experts are
    Megatron-Core's SequentialMLP in both backends: one product after the other, the same parameters.
    """
    linears = MixerSubmodules(backend.column_parallel_linear, backend.row_parallel_linear)

    mixer_layer = ModuleSpec(
        MixerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=ResidualRMSNorm,
            self_attention=ModuleSpec(PatternMixer, submodules=linears),
            self_attn_bda=get_bias_dropout_add,
        ),
    )
    swiglu = MLPSubmodules(
        linear_fc1=backend.column_parallel_linear,
        linear_fc2=backend.row_parallel_linear,
        activation_func=backend.activation,
    )
    experts = MoESubmodules(experts=functools.partial(SequentialMLP, submodules=swiglu))
    mlp_layer, moe_layer = (
        ModuleSpec(
            FeedForwardLayer,
            submodules=TransformerLayerSubmodules(pre_mlp_layernorm=ResidualRMSNorm, mlp=mlp, mlp_bda=get_bias_dropout_add),
        )
        for mlp in (
            functools.partial(MLP.as_mlp_submodule, submodules=swiglu),
            functools.partial(MoELayer, submodules=experts),
        )
    )
    return ModuleSpec(
        HyloStack,
        submodules=HybridStackSubmodules(attention_layer=mixer_layer, mlp_layer=mlp_layer, moe_layer=moe_layer),
    )
