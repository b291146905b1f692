"""Floating-point operations of a forward pass, and the peak rate of the device they run on."""

import time

import torch

from megatron_hylo.config import ModelConfig
from megatron_hylo.config.mixers import get_mixer

# Dense bf16 peaks, FLOP/s, by a word of the device's name (vendor data sheets).
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


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
    total = 2.0 * config.vocab_size * config.hidden_size if with_head else 0.0
    for symbol in config.mixers:
        mixer = get_mixer(symbol)
        total += 2.0 * (mixer.parameters(config) + 3 * config.hidden_size * config.ffn_hidden_size)
        total += mixer.sequence_flops(config, sequence_length)
    return total


def peak_flops(device: torch.device) -> tuple[float, str]:
    """Peak FLOP/s and its source: the data sheet for a known GPU, else a measured product (fp32 on a CPU)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for word, rate in PEAK_FLOPS.items():
            if word in name:
                return rate, f"{word} data sheet, dense bf16"
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
