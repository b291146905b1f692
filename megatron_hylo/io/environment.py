"""Facts about the machine and the software of a run, for its records."""

import platform
import socket
import subprocess
from functools import partial
from importlib import metadata
from pathlib import Path

import megatron_hylo

LIBRARIES = (
    "torch", "megatron-core", "transformer-engine", "triton", "flash-linear-attention", "mamba-ssm", "transformers", "lm-eval",
    "numpy",
)  # fmt: skip


def commit() -> str | None:
    """Return the commit of this code, with "-dirty" where files were changed; None outside a git checkout."""
    root = Path(megatron_hylo.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def code_diff() -> str | None:
    """Return what this code differs in from its commit, as `git apply` takes it; None where there is no difference or no git.

    New files that git does not know are named in a last line, without their content.
    """
    root = Path(megatron_hylo.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        run = partial(subprocess.run, capture_output=True, text=True, errors="replace", timeout=60, check=True)
        diff = run(["git", "-C", str(root), "diff", "HEAD", "--no-color", "--no-ext-diff"]).stdout
        others = run(["git", "-C", str(root), "ls-files", "--others", "--exclude-standard"]).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return diff + (f"# not in git: {' '.join(others)}\n" if others else "") or None


def library_versions() -> dict[str, str]:
    """Return the versions of the LIBRARIES that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name(gpu: str | None) -> str:
    """Return HOST: DEVICE; `gpu` is the name of this rank's GPU, None for the CPU."""
    return f"{socket.gethostname()}: {gpu or platform.processor() or platform.machine()}"
