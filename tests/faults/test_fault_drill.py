"""A few of the drills of tools/fault_drill.py, as a user runs them; all kinds, many times, is that script's work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.multirank
def test_nothing_is_lost_by_a_preemption_a_flipped_bit_or_a_full_disk():
    faults = ["SIGUSR1 to all ranks", "flip a bit of a shard", "fill the disk"]
    command = [sys.executable, str(ROOT / "tools" / "fault_drill.py"), "--drills", "3", "--faults", json.dumps(faults)]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    counted = json.loads(result.stdout.splitlines()[-1])
    assert counted["failures"] == [] and counted["by_fault"] == dict.fromkeys(faults, 1)
