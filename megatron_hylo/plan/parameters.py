"""Layers and parameters of a model by kind, pipeline stage and rank, counted from its shapes."""

import functools
import itertools
from collections import Counter
from collections.abc import Mapping

from megatron_hylo.config import ModelConfig
from megatron_hylo.config.layer import LayerDescription
from megatron_hylo.config.layouts import parameter_count, pipeline_layers
from megatron_hylo.config.mixers import get_mixer
from megatron_hylo.config.mlps import MLPS, get_mlp
from megatron_hylo.config.train import TrainConfig

model_parameters = functools.lru_cache(256)(parameter_count)


def description(symbol: str) -> LayerDescription:
    """Description of a mixer or an MLP."""
    return get_mlp(symbol) if symbol in MLPS else get_mixer(symbol)


@functools.lru_cache(256)
def layer_parameters(shape: ModelConfig, symbol: str) -> int:
    """Parameters of a mixer or an MLP, without its norm."""
    return description(symbol).parameters(shape)


def stage_parameters(shape: ModelConfig, layers: Mapping[str, int], tensor: int = 1, expert: int = 1) -> float:
    """Parameters of layers on one rank, without norms.

    Args:
        shape: the model.
        layers: number of each kind.
        tensor, expert: ranks that share each layer, and its experts.
    """
    total = 0.0
    for symbol, count in layers.items():
        experts = get_mlp(symbol).expert_parameters(shape) if symbol in MLPS else 0
        total += count * ((layer_parameters(shape, symbol) - experts) / tensor + experts / expert)
    return total


def given_layers(config: TrainConfig) -> tuple[int, ...] | None:
    """Layers of each pipeline stage, where the run sets them."""
    return tuple(config.parallel.pipeline_layers) if config.parallel.pipeline_layers else None


@functools.lru_cache(256)
def stage_layers(shape: ModelConfig, stages: int, given: tuple[int, ...] | None = None) -> list[dict[str, int]]:
    """Number of mixers and MLPs of each kind of every pipeline stage; see `config.layouts.pipeline_layers`."""
    pairs, found = iter(zip(shape.mixers, shape.mlps)), list[dict[str, int]]()
    for count in pipeline_layers(shape, stages, given):
        mixers, mlps = zip(*itertools.islice(pairs, count))
        found.append(dict(Counter(mixers)) | dict(Counter(mlps)))
    return found


@functools.lru_cache(256)
def mixer_counts(shape: ModelConfig) -> dict[str, int]:
    """Number of layers of each mixer."""
    return dict(Counter(shape.mixers))


@functools.lru_cache(256)
def layer_counts(shape: ModelConfig) -> dict[str, int]:
    """Number of layers of each mixer and each MLP."""
    return mixer_counts(shape) | dict(Counter(shape.mlps))


@functools.lru_cache(256)
def linear_parameters(shape: ModelConfig) -> int:
    """Parameters of the layers, without embedding, head and norms: nearly all are linear maps."""
    return sum(layer_parameters(shape, symbol) for symbol in shape.mixers + shape.mlps)


def trains_mlps(config: TrainConfig) -> bool:
    """Whether a run trains more than a student's mixers, as `train.optimizer.choose_trainable` chooses."""
    return not (config.trainable == "mixers" or (config.stage == "align" and config.align.loss != "ild"))


def trained_parameters(config: TrainConfig, shape: ModelConfig) -> int:
    """Parameters of a student that a run trains."""
    if not trains_mlps(config):
        return sum(layer_parameters(shape, symbol) for symbol in shape.mixers)
    heads = 2 if shape.untie_embeddings_and_output_weights else 1
    return model_parameters(shape) - (heads * shape.vocab_size * shape.hidden_size if config.stage == "align" else 0)


def rank_parameters(config: TrainConfig, shape: ModelConfig, trained: bool = False, divided: bool = True) -> float:
    """Parameters of the pipeline rank that has most.

    Args:
        config: the run.
        shape: the model.
        trained: those that the run trains.
        divided: those of one rank; else of all ranks of its pipeline stage.
    """
    p = config.parallel
    tensor, expert = (p.tensor_model_parallel_size, p.expert_model_parallel_size) if divided else (1, 1)
    sizes = (given_layers(config), tensor, p.pipeline_model_parallel_size, p.virtual_pipeline_model_parallel_size)
    if not trained:
        return _rank_parameters(shape, *sizes, expert)
    count, experts = model_parameters(shape), sum(get_mlp(symbol).expert_parameters(shape) for symbol in shape.mlps)
    whole, own = trained_parameters(config, shape), _rank_parameters(shape, *sizes, expert)
    if not experts or whole > count - experts:  # all but the ends, or all
        return whole / count * own
    return whole / (count - experts) * (own - _rank_experts(shape, *sizes, expert))


def _rank_experts(
    shape: ModelConfig, given: tuple[int, ...] | None, tensor: int, pipeline: int, virtual: int, expert: int
) -> float:
    """Parameters of experts on the pipeline rank that has most of them."""
    stages = [
        sum(count * get_mlp(s).expert_parameters(shape) / expert for s, count in layers.items() if s in MLPS)
        for layers in stage_layers(shape, pipeline * virtual, given)
    ]
    return max(sum(stages[rank::pipeline]) for rank in range(pipeline))


@functools.lru_cache(1024)
def _rank_parameters(
    shape: ModelConfig, given: tuple[int, ...] | None, tensor: int, pipeline: int, virtual: int, expert: int
) -> float:
    if pipeline == 1:
        experts = sum(get_mlp(symbol).expert_parameters(shape) for symbol in shape.mlps)
        return (model_parameters(shape) - experts) / tensor + experts / expert
    stages = [stage_parameters(shape, layers, tensor, expert) for layers in stage_layers(shape, pipeline * virtual, given)]
    for end in (0, -1):  # embedding; head, a copy of the embedding where they are tied
        stages[end] += shape.vocab_size * shape.hidden_size / tensor
    return max(sum(stages[rank::pipeline]) for rank in range(pipeline))
