"""A limit of addresses at which torch.distributed's threads cannot be started ends a process in a sentence; it hung before."""

import resource
import subprocess
import sys

import pytest

from megatron_hylo.config import ConfigError
from megatron_hylo.platform.limits import check_address_space

SESSION = """
import resource
from megatron.core import parallel_state, tensor_parallel
from megatron_hylo.platform.distributed import session
from megatron_hylo.platform.limits import in_use
resource.setrlimit(resource.RLIMIT_AS, (in_use() + {mib} * 2**20,) * 2)
with session():
    print("made")
"""


def limit(monkeypatch, **limits: int) -> None:
    known = {getattr(resource, name): value for name, value in limits.items()}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (known[kind],) * 2)


def test_a_limit_leaves_room_for_stacks_and_allocations_of_the_threads(monkeypatch):
    monkeypatch.setattr("megatron_hylo.platform.limits.in_use", lambda: 2**30)
    needed = 72 * 8 * 2**20 + 64 * 2**20
    limit(monkeypatch, RLIMIT_AS=2**30 + needed, RLIMIT_STACK=8 * 2**20)
    check_address_space()
    limit(monkeypatch, RLIMIT_AS=2**30 + needed, RLIMIT_STACK=resource.RLIM_INFINITY)
    check_address_space()
    limit(monkeypatch, RLIMIT_AS=2**30 + needed - 1024, RLIMIT_STACK=8 * 2**20)
    with pytest.raises(ConfigError, match=rf"start with a limit of at least {(2**30 + needed) // 1024} KiB"):
        check_address_space()
    limit(monkeypatch, RLIMIT_AS=resource.RLIM_INFINITY, RLIMIT_STACK=8 * 2**20)
    check_address_space()


@pytest.mark.parametrize("mib", [44, 700])
def test_process_groups_are_made_or_refused_and_do_not_hang(mib):
    done = subprocess.run([sys.executable, "-c", SESSION.format(mib=mib)], capture_output=True, text=True, timeout=300)
    made = mib > 640
    assert (done.returncode, "made" in done.stdout) == (0 if made else 1, made), done.stderr[-500:]
    assert made or "is too low for 72 threads of torch.distributed" in done.stderr.splitlines()[-1]
