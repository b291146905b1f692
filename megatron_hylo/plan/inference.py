"""Inference on one GPU: longest context, largest batch and tokens a second by length, beside the dense base."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_hylo.config import ModelConfig
from megatron_hylo.config.layouts import kv_elements, parameter_count
from megatron_hylo.config.mixers import ATTENTION_SYMBOL, get_mixer
from megatron_hylo.config.mlps import get_mlp
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.plan.flops import forward_flops_per_token
from megatron_hylo.plan.hardware import GB, Hardware
from megatron_hylo.plan.memory import GIB
from megatron_hylo.plan.parameters import layer_counts
from megatron_hylo.plan.rates import get_rates
from megatron_hylo.plan.step import LayerTimes

LENGTHS = (8_192, 32_768, 131_072, 524_288, 1_048_576)
WORKSPACE = 2 * GIB  # of a prefill in chunks, logits and the libraries; assumed
ROOM = 0.92  # of a GPU's memory, vLLM's default for `gpu_memory_utilization` since 0.11
STATE_BYTES = 4  # recurrent states are kept in fp32
CACHE_BYTES = 2  # a number of the KV cache, in bf16


@dataclass(frozen=True)
class Serving:
    """Batch and speed of one GPU that serves a model at one length of context.

    Args:
        length: tokens of context.
        batch: largest number of sequences of that length at once; 0 where one does not fit.
        one, all: tokens a second of one sequence alone, and of the largest batch together.
        prefill_seconds: time to read the context of one sequence.
    """

    length: int
    batch: int
    one: float
    all: float
    prefill_seconds: float


def dense_base(shape: ModelConfig) -> ModelConfig:
    """The same backbone with attention in every layer."""
    return shape.with_mixers(ATTENTION_SYMBOL * shape.num_hidden_layers)


def state_bytes(shape: ModelConfig) -> int:
    """Bytes of a sequence's recurrent states and last inputs of convolutions, whatever its length."""
    return STATE_BYTES * sum(get_mixer(symbol).state_numbers(shape) for symbol in shape.mixers)


def longest_context(shape: ModelConfig, hardware: Hardware) -> int | None:
    """Tokens of the longest sequence whose cache fits beside the weights; None where the cache does not grow."""
    each = CACHE_BYTES * sum(get_mixer(symbol).kv_numbers(shape) for symbol in shape.mixers)
    windows = CACHE_BYTES * kv_elements(shape, shape.attention_window) - each * shape.attention_window  # of a longer sequence
    return int(max(_room(shape, hardware) - state_bytes(shape) - windows, 0) // each) if each else None


def serving(shape: ModelConfig, hardware: Hardware, lengths: Sequence[int] = LENGTHS) -> list[Serving]:
    """Predict batch and speed at each length, weights and cache in bf16.

    A step of decoding reads its tokens' weights once and each sequence's cache; its products count where they take longer.

    Args:
        shape: the model.
        hardware: the GPU.
        lengths: tokens of context.
    """
    rates = get_rates()
    rows = []
    for length in lengths:
        cache = CACHE_BYTES * kv_elements(shape, length)
        state = state_bytes(shape)
        batch = int(max(_room(shape, hardware), 0) // (cache + state))
        flops = forward_flops_per_token(shape, 2 * length)  # the mean of a causal sequence twice as long is its last token's

        def rate(sequences: int, flops: float = flops, moved: int = cache + 2 * state) -> float:
            """Tokens a second of a batch."""
            memory = (2 * read_parameters(shape, sequences) + sequences * moved) / (hardware.memory_gb_s * GB * rates.decode)
            return sequences / max(memory, sequences * flops / (hardware.peak() * rates.products))

        rows.append(
            Serving(
                length,
                batch,
                rate(1) if batch else 0.0,
                rate(batch) if batch else 0.0,
                prefill_seconds(shape, hardware, length),
            )
        )
    return rows


def read_parameters(shape: ModelConfig, tokens: int) -> float:
    """Parameters that are read for so many tokens at once: not others' embeddings, nor experts that none goes through."""
    missed = 0.0
    embeddings = shape.vocab_size * shape.hidden_size if shape.untie_embeddings_and_output_weights else 0
    if shape.has_experts:
        missed = (1 - shape.moe_router_topk / shape.num_moe_experts) ** tokens
    return parameter_count(shape) - embeddings - missed * sum(get_mlp(symbol).expert_parameters(shape) for symbol in shape.mlps)


def prefill_seconds(shape: ModelConfig, hardware: Hardware, length: int) -> float:
    """Seconds to read one sequence: forward passes of all layers, as in training."""
    config = TrainConfig("pretrain", "-", "-", scratch="-", sequence_length=length)
    layers, counts = LayerTimes(shape, config, hardware, get_rates()), layer_counts(shape)
    return sum(count * sum(vars(layers.passes(symbol)[0]).values()) for symbol, count in counts.items())


def _room(shape: ModelConfig, hardware: Hardware) -> float:
    return ROOM * hardware.memory_gib * GIB - 2 * parameter_count(shape) - WORKSPACE
