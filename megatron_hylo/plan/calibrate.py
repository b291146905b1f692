"""Rates of the machine at hand, measured within a minute for `hylo plan --calibrate`: products, attention, copies."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_hylo.kernels.attention import attention
from megatron_hylo.plan.hardware import Hardware

WIDTHS = (64, 128)  # of heads


def measure_rates(hardware: Hardware, device: torch.device, size: int = 8192, tokens: int = 16_384) -> dict[str, Any]:
    """Measure shares of the data sheet that this device reaches; those that take a whole step are left as they are.

    Args:
        hardware: what the shares are of.
        device: a GPU in bf16, or a CPU in fp32.
        size: rows and columns of matrix products.
        tokens: of attention, with 2,048 channels over all heads.

    Returns:
        Values of rates.yaml by key: products, attention_forward, attention_backward and, on a GPU, host.
    """
    dtype, peak = torch.bfloat16 if device.type == "cuda" else torch.float32, hardware.peak()

    def seconds(call: Callable[[], object]) -> float:
        """Fastest of some calls after a first one."""
        times = []
        for _ in range(6):
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            times.append(time.perf_counter() - start)
        return min(times[1:])

    a = torch.randn(size, size, device=device, dtype=dtype)
    found: dict[str, Any] = {"products": 2 * size**3 / seconds(lambda: a @ a) / peak}
    found |= {"attention_forward": {}, "attention_backward": {}}
    for width in WIDTHS:
        heads = 2048 // width
        q, k, v = (torch.randn(1, tokens, heads, width, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

        def forward(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> torch.Tensor:
            """One causal pass."""
            return attention(q, k, v, q.shape[-1] ** -0.5)

        def both(run: Callable[[], torch.Tensor] = forward) -> None:
            """A pass and its gradients."""
            out = run()
            out.backward(out.detach())

        flops = 2.0 * heads * width * tokens**2  # of a causal pass; the backward pass has 2.5 times as many
        there, whole = seconds(forward), seconds(both)
        found["attention_forward"][width] = flops / there / peak
        found["attention_backward"][width] = 2.5 * flops / max(whole - there, 1e-9) / peak
    if device.type == "cuda":
        host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        there_bytes = torch.empty_like(host, device=device)
        found["host"] = host.numel() / seconds(lambda: there_bytes.copy_(host, non_blocking=True)) / hardware.host_gb_s / 1e9
    return _rounded(found)


def write_rates(file: Path, rates: dict[str, Any], name: str) -> None:
    """Write measured rates, for `hylo plan --rates`; keys that it lacks are those of rates.yaml."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"# Measured by hylo plan --calibrate on {name}\n" + yaml.safe_dump(rates, sort_keys=False))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    return float(f"{value:.4g}")
