"""A teacher on a GPU of its own that feeds a student on another, against both on one GPU.

    python benchmarks/remote_teacher.py                 # 8B-shaped teacher, 1B-shaped student, 65,536 tokens, GPUs 0 and 1
    python benchmarks/remote_teacher.py --layout smollm2-135m-8mla22gdn --teacher smollm2-135m --length 64    # on a CPU

Whole steps of the training loop with random weights, as benchmarks/scaling.py takes them; the teacher is the server of
`hylo serve-teacher`. Prints a table and, last, one JSON line; writes RESULTS.md.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from report import device_name, random_text, report
from scaling import measure

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.config.layouts import BASES
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.models.frozen import freeze
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.platform.distributed import session
from megatron_hylo.teachers.remote import RemoteTeacher
from megatron_hylo.teachers.server import Replica

TIMEOUT = timedelta(minutes=10)
COLUMNS = (
    "teacher",
    "s / step",
    "tokens/s",
    "tokens/s a GPU",
    "student's GPU, peak GiB",
    "teacher's GPU, peak GiB",
    "sent, MB",
)


def main(
    layout: str = "llama3.2-1b-4mla12gdn",
    teacher: str = "llama3.1-8b",
    length: int = 65_536,
    repeats: int = 3,
    results: Path = Path("benchmarks/results/remote_teacher"),
    commit: str = "",
    role: Literal["", "server", "remote", "online"] = "",
    address: str = "",
    scratch: str = "",
) -> None:
    """Measure both ways.

    Args:
        layout: the student.
        teacher: base model.
        length: tokens of a sequence, one a step.
        repeats: timed steps.
        results: path without suffix of the .md to write.
        commit: of the code, for the results file.
        role, address, scratch: of a process that this one starts.
    """
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    if role == "server":
        with session():
            (model,) = freeze([build_model(BASES[teacher], params_dtype=dtype)])
            Replica(model, address, dtype, TIMEOUT).serve(1)
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        return print(json.dumps({"peak_gib": peak}))
    if role:
        with session():
            config = TrainConfig(
                stage="distil", data=f"{scratch}/data", output="-", model="-", teacher="-", sequence_length=length,
                global_batch_size=1, recompute=True, loss_chunk_tokens=4096,
                precision="bf16" if dtype == torch.bfloat16 else "fp32",
            )  # fmt: skip
            elsewhere = RemoteTeacher(address, dtype, TIMEOUT) if role == "remote" else None
            print(json.dumps(measure(config, layout, teacher, repeats, elsewhere)), flush=True)
        os._exit(0)  # the link's thread is waiting for an answer
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        random_text(Path(folder) / "data", BASES[teacher].vocab_size, {"train": (1, 8 * length)})
        free.bind(("127.0.0.1", 0))
        there = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()

        def start(role: str, gpu: int) -> subprocess.Popen:
            command = [sys.executable, __file__, "--layout", layout, "--teacher", teacher, "--length", str(length), "--repeats",
                       str(repeats), "--role", role, "--address", there, "--scratch", folder]  # fmt: skip
            return subprocess.Popen(
                command, env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}, stdout=subprocess.PIPE, text=True
            )

        def result(process: subprocess.Popen) -> dict[str, Any]:
            output, _ = process.communicate()
            return json.loads(output.splitlines()[-1]) if process.returncode == 0 else sys.exit(output)

        server = start("server", 0)
        try:
            rows = {"on its own GPU": result(start("remote", 1))}
            rows["on its own GPU"] |= {"teacher_peak_gib": result(server)["peak_gib"]}
        finally:
            if server.poll() is None:
                server.send_signal(signal.SIGKILL)
        rows["on the student's GPU"] = result(start("online", 1))
    _show(rows, layout, teacher, length, results, commit)


def _show(rows: dict[str, dict[str, Any]], layout: str, teacher: str, length: int, results: Path, commit: str) -> None:
    sent = length * (BASES[teacher].hidden_size * (2 if torch.cuda.is_available() else 4) + 8)
    cells = []
    for name, r in rows.items():
        remote = "teacher_peak_gib" in r
        there, rate = f"{r['teacher_peak_gib']:.1f}" if remote else "", length / r["seconds"]
        cells.append((name, f"{r['seconds']:.2f}", f"{rate:,.0f}", f"{rate / (1 + remote):,.0f}", f"{r['peak_gib']:.1f}", there,
                      f"{sent / 1e6:,.0f}" if remote else ""))  # fmt: skip
    intro = f"{layout}, teacher {teacher}, random weights, {length:,} tokens a step, recomputed activations."
    report(results, "A teacher on a GPU of its own", [intro], COLUMNS, cells, f"{device_name()}, commit {commit}")
    print(json.dumps({"benchmark": "remote_teacher", "device": device_name(), "sent_bytes": sent, "rows": rows}))


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
