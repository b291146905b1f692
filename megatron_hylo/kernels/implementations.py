"""Names of operations and of their implementations, and those that `HYLO_KERNELS` asks for; PyTorch is not imported."""

import functools
import os

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "attention": ("torch", "cudnn", "flash", "efficient", "math", "fa4"),
    "attention_forward": ("torch", "fa3", "fa3_fp8"),
    "causal_conv1d": ("torch", "fla", "gluon"),
    "causal_conv1d_step": ("torch", "triton"),
    "concatenate": ("torch", "triton"),
    "decode_attention": ("torch", "triton"),
    "delta_rule_state_pass": ("fla", "gluon"),
    "elementwise": ("torch", "inductor"),
    "gated_delta_rule": ("torch", "fla"),
    "head_softmax": ("torch", "triton"),
    "kda": ("torch", "fla"),
    "matvec": ("torch", "triton"),
    "rms_norm": ("torch", "triton"),
    "ssd": ("torch", "mamba_ssm"),
    "window_attention": ("torch",),
}
ENVIRONMENT_VARIABLE = "HYLO_KERNELS"


def check(op: str, implementation: str) -> None:
    """Refuse an unknown operation or implementation.

    Raises:
        ValueError: naming the allowed ones.
    """
    if op not in IMPLEMENTATIONS:
        raise ValueError(f"unknown operation {op!r}; use one of {', '.join(IMPLEMENTATIONS)}")
    if implementation not in IMPLEMENTATIONS[op]:
        raise ValueError(f"{op} has no implementation {implementation!r}; use one of {', '.join(IMPLEMENTATIONS[op])}")


def asked_for() -> dict[str, str]:
    """Operation -> implementation as the environment variable names them.

    Raises:
        ValueError: it names an unknown operation or implementation.
    """
    return _parse(os.environ.get(ENVIRONMENT_VARIABLE, ""))


@functools.cache
def _parse(setting: str) -> dict[str, str]:
    found = {}
    for item in filter(None, (part.strip() for part in setting.split(","))):
        op, _, implementation = item.partition("=")
        check(op, implementation)
        found[op] = implementation
    return found
