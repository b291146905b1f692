"""Whole models out of whole models, one layer in memory at a time.

`upcycled` makes an untrained hybrid from a Transformer: its backbone verbatim, its mixers by an initialiser. `assembled`
makes the hybrid of stage 2 from the two aligned pure models of stage 1. Both are readers of tensors by canonical name, each
computed when it is asked for, so that a writer can stream.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.config.layer import Shape
from megatron_hylo.config.mixers import ATTENTION_SYMBOL, COPIED_SYMBOLS, LINEAR_SYMBOLS, MLA_SYMBOL, get_mixer
from megatron_hylo.config.tensor_names import tensor_names
from megatron_hylo.initialise.registry import CalibrationStatistics, get_initialiser

Read = Callable[[str], Tensor]  # canonical name -> CPU tensor
LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")

_BACKBONE = (
    "hidden_size", "ffn_hidden_size", "num_hidden_layers", "vocab_size",
    "mlps", "num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax",
)  # fmt: skip
_ATTENTION = ("num_attention_heads", "num_query_groups", "kv_channels", "add_qkv_bias", "qk_layernorm")


class Source(NamedTuple):
    """A model to take tensors from."""

    config: ModelConfig
    read: Read


def upcycled(
    read_teacher: Read,
    teacher_config: ModelConfig,
    student_config: ModelConfig,
    initialiser: str = "paper",
    seed: int = 0,
    statistics: Mapping[int, CalibrationStatistics] | None = None,
) -> Read:
    """Reader of the tensors of a student made from a teacher, which are computed when they are asked for.

    Embedding, norms, MLPs and output head are the teacher's, untouched (an untied student of a tied teacher gets a copy
    of the embedding as its head); so are layers that stay attention. A mixer depends on the teacher's layer, the seed
    and the layer's index alone, not on what the other layers become. The last mixer asked for is kept.

    Args:
        read_teacher: gives a tensor of the teacher by its canonical name.
        teacher_config: attention in every layer.
        student_config: the hybrid; same hidden size, MLP, depth and vocabulary.
        initialiser: a name out of `initialiser_names()`.
        seed: of everything random.
        statistics: calibration statistics by layer index, for initialisers that use them.

    Returns:
        Canonical name -> CPU tensor; new mixers are fp32, what is copied keeps the teacher's dtype.

    Raises:
        ConfigError: at once, if teacher and student do not fit or the initialiser is unknown; when reading, if a
            tensor has another shape than its configuration says or a mixer's dimensions do not suit the initialiser.
    """
    if not teacher_config.is_transformer:
        raise ConfigError(
            f"the teacher must be attention (`*`, `W`) in every layer, its pattern is {teacher_config.hybrid_layer_pattern!r}"
        )
    _check_same(teacher_config, student_config, _BACKBONE, "a student keeps its teacher's backbone")
    if kept := sorted(set(student_config.mixers) & set(COPIED_SYMBOLS)):
        _check_same(teacher_config, student_config, _ATTENTION, f"a layer that stays attention `{kept[0]}` is copied")
    _check_head(teacher_config, student_config)
    initialisers = {
        symbol: get_initialiser(initialiser, symbol) for symbol in sorted(set(student_config.mixers) - set(COPIED_SYMBOLS))
    }

    shapes = tensor_names(student_config)
    last: dict[int, dict[str, Tensor]] = {}

    def mixer_of(layer: int) -> dict[str, Tensor]:
        """Make the mixer of a layer from its attention, with random numbers of that layer alone; the last one made is kept."""
        if layer not in last:
            last.clear()
            attention = attention_tensors(read_teacher, teacher_config, layer)
            layer_statistics, symbol = statistics.get(layer) if statistics is not None else None, student_config.mixers[layer]
            generator = layer_generator(seed, layer)
            mixer = initialisers[symbol](attention, student_config, teacher_config, generator, layer_statistics)
            _check_mixer(mixer, get_mixer(symbol).tensors(student_config), initialiser, symbol)
            last[layer] = dict(mixer)
        return last[layer]

    def read(name: str) -> Tensor:
        """Return a tensor of the student by its Hugging Face name: made by the initialiser, or the teacher's of that name."""
        if (found := LAYER.match(name)) is None:
            return _end_tensor(Source(teacher_config, read_teacher), name, shapes[name])
        layer, own = int(found[1]), found[2]
        symbol = student_config.mixers[layer]
        if symbol in initialisers and own in get_mixer(symbol).tensors(student_config):
            return mixer_of(layer)[own]
        return _checked(read_teacher, name, shapes[name])

    return read


def assembled(mla: Source, linear: Source, base: Source, target_config: ModelConfig) -> Read:
    """Reader of the tensors of a hybrid picked layer by layer from two aligned models (HyLo trains pure models first).

    A layer is taken whole, mixer, MLP and norms: from the MLA model where the target has `+`, from the linear model
    where it has a linear mixer. Embedding, final norm and output head are the base model's.

    Args:
        mla: the aligned model whose layers are MLA (at least those the target wants).
        linear: the aligned model whose layers are linear.
        base: the model both were made from.
        target_config: the hybrid.

    Returns:
        Canonical name -> CPU tensor, dtypes as read.

    Raises:
        ConfigError: at once, if one of the models does not fit the target or the target has an attention layer `*`;
            when reading, if a tensor has another shape than its configuration says.
    """
    sources = {MLA_SYMBOL: mla} | {symbol: linear for symbol in LINEAR_SYMBOLS}
    if copied := [(layer, symbol) for layer, symbol in enumerate(target_config.mixers) if symbol in COPIED_SYMBOLS]:
        layer, symbol = copied[0]
        raise ConfigError(
            f"layer {layer} of the target is attention `{symbol}`; assembled models have one of {' '.join(sources)} in every "
            f"layer"
        )
    for source in (mla, linear, base):
        _check_same(source.config, target_config, _BACKBONE, "all assembled models share one backbone")
    _check_head(base.config, target_config)
    for layer, symbol in enumerate(target_config.mixers):
        has, what = sources[symbol].config, "MLA" if symbol == MLA_SYMBOL else "linear"
        if has.mixers[layer] != symbol:
            raise ConfigError(f"layer {layer} of the target is `{symbol}`, but of the {what} model it is `{has.mixers[layer]}`")
        wanted, found = get_mixer(symbol).tensors(target_config), get_mixer(symbol).tensors(has)
        if wanted != found:
            name = next(n for n in {**wanted, **found} if wanted.get(n) != found.get(n))
            raise ConfigError(
                f"layer {layer} `{symbol}`: {name} is {found.get(name, 'absent')} in the {what} model, "
                f"{wanted.get(name, 'absent')} in the target; give the target the dimensions of the models it is made of"
            )

    shapes = tensor_names(target_config)

    def read(name: str) -> Tensor:
        """Return a tensor of the hybrid by its Hugging Face name, from the model that has the layer's kind of mixer."""
        if (found := LAYER.match(name)) is None:
            return _end_tensor(base, name, shapes[name])
        return _checked(sources[target_config.mixers[int(found[1])]].read, name, shapes[name])

    return read


def attention_tensors(read: Read, config: ModelConfig, layer: int) -> dict[str, Tensor]:
    """One attention layer of a teacher as initialisers see it (`registry.TeacherLayer`), dtypes as read.

    Args:
        read: Hugging Face name -> tensor.
        config: of the teacher.
        layer: number of the layer, from 0.

    Returns:
        Name within the attention ("q_proj.weight", ...) -> tensor.

    Raises:
        ConfigError: a tensor has another shape than the configuration says.
    """
    return {
        name.removeprefix("self_attn."): _checked(read, f"model.layers.{layer}.{name}", shape)
        for name, shape in get_mixer(ATTENTION_SYMBOL).tensors(config).items()
    }


def layer_generator(seed: int, layer: int) -> torch.Generator:
    """The CPU generator of one layer: the same for the same (seed, layer), whatever the other layers are."""
    digest = hashlib.sha256(f"{seed}:{layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))  # torch's CPU generator uses 32 bits of it


def _end_tensor(base: Source, name: str, shape: Shape) -> Tensor:
    """Read embedding, final norm or output head; the head of a tied model is its embedding."""
    if name != "lm_head.weight" or base.config.untie_embeddings_and_output_weights:
        return _checked(base.read, name, shape)
    return _checked(base.read, "model.embed_tokens.weight", shape).clone()  # a file may hold no two names for one memory


def _checked(read: Read, name: str, shape: Shape) -> Tensor:
    tensor = read(name)
    if tuple(tensor.shape) != shape:
        raise ConfigError(f"tensor {name} has shape {list(tensor.shape)}, its configuration asks for {list(shape)}")
    return tensor


def _check_mixer(mixer: Mapping[str, Tensor], shapes: Mapping[str, Shape], initialiser: str, symbol: str) -> None:
    made = {name: tuple(tensor.shape) for name, tensor in mixer.items()}
    if made != dict(shapes):
        name = next(n for n in {**shapes, **made} if made.get(n) != shapes.get(n))
        raise ConfigError(
            f"initialiser {initialiser!r} for `{symbol}` made {name} {made.get(name, 'not at all')}, "
            f"the student needs {shapes.get(name, 'no such tensor')}"
        )


def _check_same(source: ModelConfig, target: ModelConfig, names: Iterable[str], why: str) -> None:
    for name in names:
        has, wants = getattr(source, name), getattr(target, name)
        if has != wants:
            raise ConfigError(
                f"{name} is {has} in the model given and {wants} in the one to make; {why}, so they must be equal"
            )


def _check_head(source: ModelConfig, target: ModelConfig) -> None:
    if source.untie_embeddings_and_output_weights and not target.untie_embeddings_and_output_weights:
        raise ConfigError(
            "untie_embeddings_and_output_weights is True in the model given and False in the one to make; "
            "an output head of its own cannot be tied to the embedding, set it to True"
        )
