"""The peer of train_throughput.py: the same hybrid, loss and tokens as a user of transformers and fla would train them.

Eager transformers modules with the kernels of fla and mamba_ssm (the latter's backward pass as ours), fla's FusedKLDivLoss on
hidden states, gradient checkpointing a layer, weights and torch's fused AdamW in bf16 (ours keeps fp32 weights and gradients
besides).
"""

import importlib
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from report import architecture, free_memory, seconds
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from megatron_hylo.config.layouts import BASES
from megatron_hylo.convert.hf_config import hf_config_from_model
from megatron_hylo.hf.configuration_hylo import HyloConfig
from megatron_hylo.hf.modeling_hylo import HyloForCausalLM
from megatron_hylo.kernels.registry import override


def measure_peer(layout: str, teacher: str | None, length: int, batch: int, steps: int, recompute: bool) -> tuple[float, float]:
    """(tokens a second, median of the last half of the steps; peak GiB).

    Args:
        layout, teacher, recompute: see `build_peer`.
        length, batch: of a step, in one forward pass.
        steps: optimizer steps.
    """
    free_memory()
    step = build_peer(layout, teacher, recompute)
    times = [seconds(lambda: step(batch, length)) for _ in range(steps)][steps // 2 :]
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return batch * length / statistics.median(times), peak


def build_peer(layout: str, teacher: str | None, recompute: bool) -> Callable[[int, int], None]:
    """Return a function that takes a step with (batch, length) of random tokens.

    Args:
        layout: the student, random weights.
        teacher: base model; None for cross-entropy on labels.
        recompute: checkpoint every layer.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        config = architecture(layout)
        student = HyloForCausalLM(HyloConfig(**hf_config_from_model(config, "bfloat16"))).to(dtype).train()
        frozen, head = _teacher(teacher, dtype) if teacher else (None, None)
    if recompute:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=device.type == "cuda")
    loss_of = _kl(device) if teacher else _cross_entropy(device)

    @override("delta_rule_state_pass", "fla")  # as a user of fla has it
    def step(batch: int, length: int) -> None:
        ids = torch.randint(config.vocab_size, (batch, length + 1), device=device)
        hidden = student.model(ids[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
        if teacher is None:
            loss = loss_of(hidden, ids[:, 1:].flatten(), student.lm_head.weight)
        else:
            with torch.no_grad():
                target = frozen(ids[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
            loss = loss_of(hidden, target, student.lm_head.weight, head)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _teacher(base: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """transformers' own model of that shape, and a head."""
    values = hf_config_from_model(BASES[base], "bfloat16")
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa").eval().requires_grad_(False)
    return model, torch.randn(config.vocab_size, config.hidden_size, dtype=dtype) * 0.02


def _kl(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """(student hidden, teacher hidden, student head, teacher head) -> KL: fla's; plain on a CPU."""
    if device.type == "cuda":
        return importlib.import_module("fla.modules.fused_kl_div").FusedKLDivLoss()
    return lambda x, y, w, v: F.kl_div(
        F.log_softmax(x @ w.t(), -1), F.log_softmax(y @ v.t(), -1), reduction="batchmean", log_target=True
    )


def _cross_entropy(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(hidden, labels, head) -> the loss: fla's; plain on a CPU."""
    if device.type == "cuda":
        return importlib.import_module("fla.modules").FusedLinearCrossEntropyLoss()
    return lambda x, labels, w: F.cross_entropy(x @ w.t(), labels)
