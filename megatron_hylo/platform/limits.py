"""Limit of a process's addresses (`ulimit -v`), looked at before a library hangs at it."""

import resource
from pathlib import Path

from megatron_hylo.config import ConfigError

KIB = 1024
THREADS = 72  # of the 24 process groups of one rank over gloo, counted with torch 2.11 and Megatron-Core 0.19.2
RESERVE = 64 * 2**20  # for their allocations; groups were made, three times of three, with 24 MiB beside the stacks
USUAL_STACK = 8 * 2**20  # of a thread where stacks are unlimited; glibc takes less


def in_use() -> int:
    """Bytes of addresses that this process has reserved; 0 where /proc does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0


def check_address_space() -> None:
    """Refuse a limit of addresses at which process groups cannot be made.

    Where ProcessGroupGloo cannot start the second of its threads, its constructor destroys the condition variable that the
    first one waits on, and so waits for ever, or aborts (torch 2.11); nothing in Python can end that.

    Raises:
        ConfigError: the limit leaves less than stacks and allocations of those threads may take.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    needed = THREADS * (USUAL_STACK if stack == resource.RLIM_INFINITY else stack) + RESERVE
    used = in_use()
    if used + needed > limit:
        raise ConfigError(
            f"the limit of addresses, {limit // KIB} KiB (ulimit -v), is too low for {THREADS} threads of torch.distributed, "
            f"which reserve up to {needed // KIB} KiB besides the {used // KIB} KiB in use; start with a limit of at least "
            f"{(used + needed) // KIB} KiB, better with `ulimit -v unlimited`"
        )
