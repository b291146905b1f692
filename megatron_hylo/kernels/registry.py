"""Registry of kernels: decides which implementation of an operation runs, and logs the choice once.

Every operation has a plain-torch implementation that runs anywhere. Faster ones are taken when the
tensors are on a CUDA device and their library imports; when they should have been taken but cannot,
a warning says what to install. The environment variable `HYLO_KERNELS` ("ssd=torch,attention=math")
and the context manager `override` override the choice. The optional libraries are imported by name when
they are used: transformers refuses remote code with an import statement, anywhere, that it cannot satisfy.
"""

import contextlib
import functools
import importlib
import importlib.util
import logging
import re
import sys
import types
from collections.abc import Iterator
from typing import NamedTuple

import torch

from megatron_hylo.kernels.implementations import asked_for, check
from megatron_hylo.kernels.tuned import install

logger = logging.getLogger("megatron_hylo.kernels")

_chosen: dict[str, str] = {}
_logged: set[tuple[str, str]] = set()
_overrides: dict[str, str] = {}  # a plain dict: recomputation in backward runs in other threads, which must see it


class Unsupported(NamedTuple):
    """Why a fast implementation cannot run here."""

    reason: str
    advice: str = ""  # what to install; non-empty when the user would want the fast one, so it is worth a warning


def use(op: str, implementation: str, reason: str, level: int = logging.DEBUG) -> None:
    """Record that `implementation` runs `op`; logged once per pair.

    Args:
        op: a key of `IMPLEMENTATIONS`.
        implementation: one of its values.
        reason: why it was chosen, in a few words.
        level: logging level of the message.

    Raises:
        ValueError: unknown operation or implementation.
    """
    check(op, implementation)
    _chosen[op] = implementation
    if (op, implementation) not in _logged:
        _logged.add((op, implementation))
        logger.log(level, "%s: %s (%s)", op, implementation, reason)


def in_words() -> str:
    """Operations that have run by their implementation, in one line: "torch: attention, rms_norm; triton: concatenate"."""
    by_implementation: dict[str, list[str]] = {}
    for op, implementation in sorted(_chosen.items()):
        by_implementation.setdefault(implementation, []).append(op)
    return "; ".join(f"{implementation}: {', '.join(ops)}" for implementation, ops in sorted(by_implementation.items()))


def in_use() -> dict[str, str]:
    """Operation -> implementation that ran last, for the operations that have run."""
    return dict(_chosen)


@contextlib.contextmanager
def override(op: str, implementation: str) -> Iterator[None]:
    """Run `op` with `implementation` inside the `with` block, whatever the device.

    Raises:
        ValueError: unknown operation or implementation.
    """
    check(op, implementation)
    before = _overrides.get(op)
    _overrides[op] = implementation
    try:
        yield
    finally:
        if before is None:
            del _overrides[op]
        else:
            _overrides[op] = before


@contextlib.contextmanager
def untuned() -> Iterator[None]:
    """Recurrences and convolutions in plain torch, for a pass over little text: it ends before Triton has tuned kernels.

    Overrides of the environment variable go before.
    """
    wanted = asked_for()
    with contextlib.ExitStack() as stack:
        for op in ("causal_conv1d", "gated_delta_rule", "kda", "ssd"):
            if op not in wanted:
                stack.enter_context(override(op, "torch"))
        yield


def overridden(op: str) -> str | None:
    """Implementation that `override` or the environment variable names for `op`, if any.

    Raises:
        ValueError: the environment variable names an unknown operation or implementation.
    """
    return _overrides.get(op) or asked_for().get(op)


def select(op: str, fast: str, unsupported: Unsupported | None) -> str:
    """The implementation to run: the override, else `fast`, else "torch" where `fast` is unsupported.

    Args:
        op: operation name.
        fast: its preferred implementation.
        unsupported: why `fast` cannot run on these inputs; None if it can.

    Raises:
        RuntimeError: `fast` is the override but cannot run.
        ValueError: unknown operation or implementation.
    """
    wanted = overridden(op)
    if wanted == fast and unsupported is not None:
        advice = f"; {unsupported.advice}" if unsupported.advice else ""
        raise RuntimeError(f"{op}: {fast} was asked for by an override, but {unsupported.reason}{advice}")
    if wanted is not None:
        use(op, wanted, "override")
        return wanted
    if unsupported is None:
        use(op, fast, "available")
        return fast
    if unsupported.advice:
        use(op, "torch", f"{unsupported.reason}; slow here: {unsupported.advice}", logging.WARNING)
    else:
        use(op, "torch", unsupported.reason)
    return "torch"


def library_unsupported(library: str, module: str, x: torch.Tensor, advice: str) -> Unsupported | None:
    """Why the Triton kernels in `module` cannot run on `x`; None if they can.

    Args:
        library: its name in messages, e.g. "fla".
        module: what has to import, e.g. "fla.ops.gated_delta_rule".
        x: a tensor on the device and of the dtype in question.
        advice: what to install when the import fails.
    """
    if not x.is_cuda:
        return Unsupported(f"{library} needs a CUDA device")
    if x.dtype == torch.float64:
        return Unsupported(f"{library} has no float64 kernels")
    error = import_error(module)
    return Unsupported(f"{module} does not import: {error}", advice) if error else None


def exporting() -> bool:
    """Whether torch.export is tracing, where nothing may depend on the data; torch before 2.7 does not say so."""
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()


def triton_version() -> tuple[int, ...]:
    """Version of the installed Triton: (major, minor, patch)."""
    return tuple(int(part) for part in re.findall(r"\d+", importlib.import_module("triton").__version__)[:3])


@functools.cache
def import_error(module: str) -> str | None:
    """None if `module` imports, else the reason it does not. Its kernels' autotuners are told what is known for this GPU."""
    scan = "selective_scan_cuda"  # Mamba1's compiled scan: mamba_ssm always imports it, its SSD kernels never call it
    if module.startswith("mamba_ssm") and scan not in sys.modules and importlib.util.find_spec(scan) is None:
        sys.modules[scan] = types.ModuleType(scan)
    try:
        importlib.import_module(module)
    except ImportError as error:
        return str(error)
    if torch.cuda.is_available() and (count := install(torch.cuda.get_device_capability())):
        logger.info("%s: known configurations for %d kernels", module, count)
    return None
