"""Every tensor of a model, by its canonical (Hugging Face) name, with its shape.

The names are those of the released checkpoints' conventions: linear weights are [out, in], layer `l`
lives under `model.layers.{l}.`. Conversion, upcycling and export all take a model's list of tensors
from here, so that it is written down once.
"""

from megatron_hylo.config import ModelConfig
from megatron_hylo.config.layer import Shape
from megatron_hylo.config.mixers import get_mixer
from megatron_hylo.config.mlps import get_mlp


def layer_tensor_names(config: ModelConfig, symbol: str, mlp: str) -> dict[str, Shape]:
    """Tensors of one decoder layer (norms, mixer, MLP), named relative to `model.layers.{l}.`.

    Args:
        config: the model the layer belongs to.
        symbol, mlp: the layer's mixer and MLP.

    Raises:
        ConfigError: an unknown symbol.
    """
    d = config.hidden_size
    return {
        "input_layernorm.weight": (d,),
        **get_mixer(symbol).tensors(config),
        "post_attention_layernorm.weight": (d,),
        **get_mlp(mlp).tensors(config),
    }


def tensor_names(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of a model, in the order embedding, layers, final norm, output head.

    Args:
        config: a teacher (`*-*-...`) or a hybrid; with tied embeddings there is no `lm_head.weight`.

    Returns:
        Full canonical name (e.g. "model.layers.0.mamba.in_proj.weight") -> shape.
    """
    d = config.hidden_size
    names: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, d)}
    for layer, kinds in enumerate(zip(config.mixers, config.mlps)):
        names |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_tensor_names(config, *kinds).items()}
    names["model.norm.weight"] = (d,)
    if config.untie_embeddings_and_output_weights:
        names["lm_head.weight"] = (config.vocab_size, d)
    return names
