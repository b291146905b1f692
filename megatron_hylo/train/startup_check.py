"""Kernel check before a run on a GPU: compares its kernels with plain-torch definitions.

Each shape is checked once for a kind of GPU, library versions and our own code.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

from megatron_hylo import kernels
from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.io import DamagedError, cache_dir, read_json, write_json
from megatron_hylo.kernels.delta_rule_state_pass import OPERATION as STATE_PASS
from megatron_hylo.kernels.implementations import ENVIRONMENT_VARIABLE
from megatron_hylo.models import kernel_cases, kernel_check
from megatron_hylo.models.kernel_check import Check, check_kernels

logger = logging.getLogger("megatron_hylo.kernels")
STATE_PASS_ADVICE = f" (on Hopper try {ENVIRONMENT_VARIABLE}={STATE_PASS}=fla first: fla's own kernels in place of ours)"
LIBRARIES = ("torch", "triton", "flash-linear-attention", "mamba-ssm", "fa3-fwd", "flash-attn-4")


def check_run_kernels(configs: Sequence[ModelConfig], dtype: torch.dtype, device: torch.device, parts: bool = False) -> None:
    """Refuse kernels that are wrong on this machine; passed checks are kept in the cache folder.

    On a CPU, where all is plain torch, nothing is done.

    Args:
        configs: configurations of the models of a run.
        dtype: bf16 or fp32.
        device: device of this rank.
        parts: whether sequences are split over ranks.

    Raises:
        ConfigError: a kernel's output or gradient is wrong; says which, by how much, and how to go on.
    """
    if device.type != "cuda":
        return
    file = cache_dir() / "kernel_checks" / f"{_key(dtype, device)}.json"
    before = _kept(file)
    found = dict(before)
    for config in configs:  # models of a run share shapes
        found |= {(c.operation, c.shape): c for c in check_kernels(config, dtype, device, found, parts)}
    checks = list(found.values())[len(before) :]
    if not checks:
        logger.info("kernels were checked before on this kind of GPU at these shapes (%s)", file)
        return
    refuse_wrong(checks)
    worst = max(checks, key=lambda check: check.error / check.limit)
    logger.info(
        "%d kernels agree with plain torch; nearest to its limit: %s by %s, error %.1e of %.1e",
        len(checks), worst.operation, worst.implementation, worst.error, worst.limit,
    )  # fmt: skip
    logger.debug("kernels checked: %s", ", ".join(f"{c.operation} by {c.implementation} {c.error:.1e}" for c in checks))
    file.parent.mkdir(parents=True, exist_ok=True)
    found = _kept(file) | found  # other runs write it too
    write_json(file, {"device": torch.cuda.get_device_name(device), "checks": [asdict(c) for c in found.values()]})


def _kept(file: Path) -> dict[tuple[str, str], Check]:
    """Checks that a file holds, by operation and shape; none where it cannot be read."""
    try:
        checks = [Check(**check) for check in read_json(file, ["checks"])["checks"]] if file.is_file() else []
    except (ConfigError, DamagedError, TypeError) as error:
        logger.debug("checks are made again: %s", error)
        checks = []
    return {(c.operation, c.shape): c for c in checks}


def refuse_wrong(checks: Sequence[Check]) -> None:
    """Raise ConfigError if one of them failed."""
    for check in checks:
        if not check.ok:
            raise ConfigError(
                f"{check.operation} ({check.shape}) by {check.implementation} is wrong on this machine: {check.where} differs "
                f"from its definition by {check.error:.1e} of its size, {check.limit:.0e} is allowed. Install other versions "
                f"of {check.implementation} and Triton (Gated DeltaNet on Hopper: triton>=3.7.1; `hylo doctor` shows what is "
                f"there), or go on with plain torch: {ENVIRONMENT_VARIABLE}={check.operation}=torch"
                f"{STATE_PASS_ADVICE if check.operation == 'gated_delta_rule' else ''}"
            )


def _key(dtype: torch.dtype, device: torch.device) -> str:
    """Hash of everything but shapes that the result of a check depends on."""
    checks = [Path(kernel_cases.__file__), Path(kernel_check.__file__)]
    sources = [*sorted(Path(kernels.__file__).parent.glob("*.py")), *checks]
    own = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()
    about = [torch.cuda.get_device_name(device), str(dtype), os.environ.get(ENVIRONMENT_VARIABLE, ""), versions(), own]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the versions of the distributions that kernels come from; "" for one that is not installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found
