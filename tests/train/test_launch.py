"""Ranks that end with an exit code of their own, under torchrun without its reports."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.forked import running

ROOT = Path(__file__).parents[2]


@pytest.mark.multirank
@pytest.mark.parametrize("code, said", [(3, "stopped\n"), (1, "stopped\nerror: rank 1 ended first, with exit code 1")])
def test_a_launch_ends_with_the_code_of_a_rank_and_without_a_traceback(tmp_path, code, said):
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, sys, time\n"
        "if os.environ['RANK'] == '0':\n    time.sleep(600)\n"
        f"print('stopped', file=sys.stderr, flush=True)\nsys.exit({code})\n"
    )
    command = [sys.executable, "-m", "megatron_hylo.train.launch", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with running(command, stderr=subprocess.PIPE, env=environment) as started:
        _, error = started.communicate(timeout=120)
    assert started.returncode == code, error
    assert error.startswith(said) and error.count("\n") == said.count("\n") + (code == 1), error


@pytest.mark.multirank
def test_ctrl_c_reaches_ranks_that_work_or_wait_and_leaves_one_sentence(tmp_path):
    """The first rank sleeps, the other one waits for it in a collective; no folder of torchrun's is left."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, time\nimport torch.distributed as dist\nfrom megatron_hylo.cli.boundary import plain_errors\n"
        "dist.init_process_group('gloo')\n"
        "with plain_errors('train', 'RUN'):\n"
        "    open(os.environ['RANK'] + '.ready', 'w').close()\n"
        "    time.sleep(600) if os.environ['RANK'] == '0' else dist.barrier()\n"
    )
    command = [sys.executable, "-m", "megatron_hylo.train.launch", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # where the tests run in the background, it is not
    with running(command, stderr=subprocess.PIPE, env=environment, cwd=tmp_path, preexec_fn=heard) as started:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("*.ready"))) < 2:
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        started.send_signal(signal.SIGINT)
        _, said = started.communicate(timeout=120)
    assert started.returncode == 130 and said.count("\n") == 1 and said.startswith("interrupted: "), said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.ready", "1.ready", "worker.py"]
