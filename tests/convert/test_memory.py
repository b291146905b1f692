"""Peak memory of conversion, verification by hashes, upcycling and export stays far below the size of the model."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.convert import write_source
from megatron_hylo.config import layouts

PROGRAM = """
from megatron_hylo.io.start_up import reuse_memory
reuse_memory()  # as the verbs do
import sys, resource, torch
from megatron_hylo.config.upcycle import UpcycleConfig
from megatron_hylo.convert.to_hf import convert_megatron_to_hf
from megatron_hylo.convert.to_megatron import convert_hf_to_megatron
from megatron_hylo.convert.verify_hashes import verify_hashes
from megatron_hylo.io import overlap
from megatron_hylo.platform.distributed import session
from megatron_hylo.upcycle.run import upcycle_folder

def status(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) * 1024

def make_all(folder, pattern):
    convert_hf_to_megatron(f"{folder}/source", f"{folder}/teacher", verify=False)
    assert verify_hashes(f"{folder}/source", f"{folder}/teacher").ok
    upcycle_folder(UpcycleConfig(f"{folder}/teacher", f"{folder}/hybrid", pattern=pattern, init="paper"))
    convert_megatron_to_hf(f"{folder}/hybrid", f"{folder}/export", verify=False)

overlap.WAITING_BYTES = 2**24
with session():
    make_all(sys.argv[1], "G")  # imports what is imported late
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + int(sys.argv[3]),) * 2)
    make_all(sys.argv[2], "G" * 30)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts memory on Linux alone")
def test_a_model_larger_than_the_memory_it_may_use_is_converted_and_upcycled(tmp_path, monkeypatch):
    """The kernel refuses more than 170 MB beyond what the imports took; the model has 350 MB."""
    shape = dict(hidden_size=384, ffn_hidden_size=4608, num_attention_heads=6, num_query_groups=2, kv_channels=64)
    wide = layouts.BASES["smollm2-135m"].replace(vocab_size=8192, **shape)
    monkeypatch.setitem(layouts.BASES, "wide", wide)
    monkeypatch.setitem(layouts.BASES, "tiny", wide.replace(hybrid_layer_pattern="*-", ffn_hidden_size=64, vocab_size=64))
    for name in ("tiny", "wide"):
        (tmp_path / name).mkdir()
        size = write_source(tmp_path / name / "source", name)
    assert size > 340e6
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, tmp_path / "tiny", tmp_path / "wide", str(170_000_000)],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
