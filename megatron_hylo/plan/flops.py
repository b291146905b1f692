"""Floating-point operations of a forward pass, and the peak rate of the device they run on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from megatron_hylo.config import ModelConfig
from megatron_hylo.config.mixers import get_mixer
from megatron_hylo.config.mlps import get_mlp
from megatron_hylo.config.teacher_window import repeats
from megatron_hylo.plan.hardware import get_hardware, names, of_device

if TYPE_CHECKING:
    import torch

# Dense bf16 peaks, FLOP/s, by a word of the device's name (vendor data sheets).
PEAK_FLOPS = {one.words: one.peak() for one in map(get_hardware, names())}


def forward_flops_per_token(config: ModelConfig, sequence_length: int, with_head: bool = True) -> float:
    """Model FLOPs of one token's forward pass, averaged over a causal sequence; a backward pass costs twice as much.

    Two per weight of each matrix product, and what each mixer's description counts besides: attention over the causal
    sequence, or updates and reads of the recurrent state.

    Args:
        config: the model.
        sequence_length: tokens of the sequence.
        with_head: count the output head.

    Raises:
        ConfigError: a mixer that has no description.
    """
    return sum(flops_by_layer(config, sequence_length, with_head).values())


def teacher_flops_per_token(config: ModelConfig, sequence_length: int, window: int | None, with_head: bool = True) -> float:
    """Model FLOPs of a teacher's forward pass for each token of a sequence, which it may read in overlapping windows.

    Args:
        config: the teacher.
        sequence_length: tokens of the sequence.
        window: tokens of a window (`TeacherWindow.window`); None: the sequence is read whole.
        with_head: count the output head, which computes each token once.
    """
    if window is None:
        return forward_flops_per_token(config, sequence_length, with_head)
    layers = forward_flops_per_token(config, window, with_head=False)
    head = forward_flops_per_token(config, window) - layers if with_head else 0.0
    return repeats(sequence_length, window) * layers + head


def flops_by_layer(config: ModelConfig, sequence_length: int, with_head: bool = True) -> dict[str, float]:
    """Model FLOPs of one token's forward pass by kind of layer, all of a kind together: "-" MLPs, "E" experts, "head", mixers.

    Args:
        config, sequence_length, with_head: see `forward_flops_per_token`.

    Raises:
        ConfigError: a mixer that has no description.
    """
    found = {"head": 2.0 * config.vocab_size * config.hidden_size} if with_head else {}
    for symbol in dict.fromkeys(config.mlps):
        found[symbol] = 2.0 * config.mlps.count(symbol) * get_mlp(symbol).active_parameters(config)
    for symbol in dict.fromkeys(config.mixers):
        mixer = get_mixer(symbol)
        one = 2.0 * mixer.parameters(config) + mixer.sequence_flops(config, sequence_length)
        found[symbol] = config.mixers.count(symbol) * one
    return found


def mlp_flops(config: ModelConfig) -> float:
    """Model FLOPs of one token's forward pass through all MLPs; of a mixture those of the token's own experts."""
    return sum(2.0 * get_mlp(symbol).active_parameters(config) for symbol in config.mlps)


def peak_flops(device: torch.device) -> tuple[float, str]:
    """Peak FLOP/s and its source: the data sheet for a known GPU, else a measured product (fp32 on a CPU)."""
    import torch

    if device.type == "cuda" and (known := of_device(torch.cuda.get_device_name(device))):
        return known.peak(), f"{known.words} data sheet, dense bf16"
    dtype, n = (torch.bfloat16, 8192) if device.type == "cuda" else (torch.float32, 1024)
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        product = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    del product
    return 2.0 * n**3 / best, f"measured {n}^3 {dtype} product"
