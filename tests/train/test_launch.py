"""Ranks that end with an exit code of their own, under torchrun without its reports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.multirank
@pytest.mark.parametrize("code, said", [(3, "stopped\n"), (1, "stopped\nerror: rank 1 ended first, with exit code 1")])
def test_a_launch_ends_with_the_code_of_a_rank_and_without_a_traceback(tmp_path, code, said):
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, sys, time\n"
        "if os.environ['RANK'] == '0':\n    time.sleep(60)\n"
        f"print('stopped', file=sys.stderr, flush=True)\nsys.exit({code})\n"
    )
    command = [sys.executable, "-m", "megatron_hylo.train.launch", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == code, result.stderr
    assert result.stderr.startswith(said) and result.stderr.count("\n") == said.count("\n") + (code == 1), result.stderr
