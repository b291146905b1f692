"""Kill, fill and damage a training run many times: is anything lost that was saved, is anything damaged ever trusted?

    python tools/fault_drill.py                      # 50 drills on 2 gloo ranks, about 30 minutes on 2 cores
    python tools/fault_drill.py --drills 5 --faults ["flip a bit of a shard"]

A drill starts a tiny real run under torchrun, plants one fault at a random moment, starts the same command again until the
run ends, and compares every step's loss with a run that nothing happened to. Prints a table and, last, one JSON line;
exits 1 if a step that a finished checkpoint held was lost, a damaged checkpoint was read, or a loss differs.
"""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import yaml
from jsonargparse import auto_cli
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from rich.console import Console
from rich.progress import track
from rich.table import Table

from megatron_hylo.config import ModelConfig, ParallelConfig
from megatron_hylo.config.train import CheckpointSettings, LoggingSettings, TrainConfig
from megatron_hylo.eval.runs import read_records
from megatron_hylo.models.checkpoint import save_model
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.platform.distributed import session

STEPS, SAVE_INTERVAL = 24, 4
TIMEOUT_MINUTES = 0.4
ROOT = Path(__file__).parents[1]
LARGEST_FILE = 100_000  # bytes, where the disk is "full"; a checkpoint of the tiny run has larger files


class DrillFailure(Exception):
    """What must not happen; the message says what did."""


class Run:
    """One training run in its folder, started as often as need be."""

    def __init__(self, folder: Path, recipe: Path, ranks: int) -> None:
        self.folder, self.recipe, self.ranks = folder, recipe, ranks
        self.process: subprocess.Popen | None = None
        self.seen_step = 0  # newest checkpoint that was ever whole

    def start(self, full_disk: bool = False) -> None:
        """Begin or go on, as leader of a process group."""
        limit = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))) if full_disk else None
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        command += ["-m", "megatron_hylo.cli", "train", "--config", str(self.recipe), "--output", str(self.folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            preexec_fn=limit,
        )  # fmt: skip

    def wait(self, condition: Callable[[], bool], seconds: float = 120) -> bool:
        """Until something is so; False if the run ended before."""
        deadline = time.monotonic() + seconds
        while not condition():
            self.look()
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise DrillFailure(f"the run did not come to the point of the fault in {seconds} s")
            time.sleep(0.002)
        return True

    def look(self) -> None:
        """Remember the newest whole checkpoint."""
        for file in (self.folder / "checkpoints").glob("step_*/manifest.json"):
            self.seen_step = max(self.seen_step, int(file.parent.name.split("_")[1]))

    def finish(self) -> tuple[int, str]:
        """(exit status, output) once it has ended; no process of it is left."""
        try:
            output, _ = self.process.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            self.kill()
            raise DrillFailure("a run hung for three minutes after the fault") from None
        self.look()
        return self.process.returncode, output

    def kill(self) -> None:
        """End the launcher and its ranks, if they still run: nothing may write into a folder that is about to be removed."""
        if self.process is None or self.process.poll() is not None:
            return
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.communicate()

    def losses(self) -> dict[int, float]:
        """By step, out of metrics.jsonl, whose last line may be half written while the run goes on."""
        return {record["step"]: record["loss"] for record in read_records(self.folder) if "loss" in record}

    def rank_processes(self) -> list[psutil.Process]:
        """The ranks, not the launcher."""
        return psutil.Process(self.process.pid).children()

    def newest_shard(self) -> Path:
        """The largest file of the newest checkpoint."""
        newest = max((self.folder / "checkpoints").glob("step_*"))
        return max(newest.rglob("*.distcp"), key=lambda file: file.stat().st_size)


def kill_in_step(run: Run, chance: random.Random) -> None:
    """SIGKILL to one rank in a step."""
    step = chance.randrange(1, STEPS - 2)
    if run.wait(lambda: len(run.losses()) >= step):
        _kill_one(run, chance, chance.uniform(0, 0.1))


def kill_in_save(run: Run, chance: random.Random) -> None:
    """SIGKILL to one rank while a checkpoint is written."""
    step = chance.randrange(1, STEPS - SAVE_INTERVAL)
    if run.wait(lambda: len(run.losses()) >= step and any((run.folder / "checkpoints").glob(".*.partial"))):
        _kill_one(run, chance, chance.uniform(0, 0.15))


def kill_in_seal(run: Run, chance: random.Random) -> None:
    """SIGKILL to one rank between the manifest and the rename, or just after."""
    if run.wait(lambda: any((run.folder / "checkpoints").glob(".*.partial/manifest.json"))):
        _kill_one(run, chance, chance.uniform(0, 0.01))


def _kill_one(run: Run, chance: random.Random, delay: float) -> None:
    time.sleep(delay)
    run.look()
    ranks = run.rank_processes()
    if ranks:
        chance.choice(ranks).kill()


def hang(run: Run, chance: random.Random) -> None:
    """A rank stops answering: the others must end the run with a sentence, in the configured time and a minute to clean up."""
    step = chance.randrange(1, STEPS - 2)
    if not run.wait(lambda: len(run.losses()) >= step):
        return
    chance.choice(run.rank_processes()).suspend()
    started = time.monotonic()
    status, output = run.finish()
    took = time.monotonic() - started
    if status == 0 or "another rank did not answer" not in " ".join(output.split()) or took > 60 * TIMEOUT_MINUTES + 60:
        raise DrillFailure(
            f"a rank that hangs did not end the run with a sentence: exit {status} after {took:.0f} s, {output[-900:]}"
        )


def preempt(number: signal.Signals) -> Callable[[Run, random.Random], None]:
    """A signal to every rank, as Slurm sends before preemption; the run must save its step and exit."""

    def send(run: Run, chance: random.Random) -> None:
        step = chance.randrange(1, STEPS - 4)
        if not run.wait(lambda: len(run.losses()) >= step):
            return
        done = max(run.losses())
        for rank in run.rank_processes():
            rank.send_signal(number)
        run.finish()
        if run.seen_step < done:
            raise DrillFailure(f"{number.name} after step {done}, but the newest checkpoint is of step {run.seen_step}")

    return send


def damage(spoil: Callable[[Path, random.Random], None]) -> Callable[[Run, random.Random], None]:
    """Spoil a file of the newest checkpoint of a stopped run; it must be named and not read."""

    def stop_and_spoil(run: Run, chance: random.Random) -> None:
        if not run.wait(lambda: bool(run.losses())):
            return
        preempt(signal.SIGUSR1)(run, chance)
        shard = run.newest_shard()
        spoil(shard, chance)
        run.start()
        status, output = run.finish()
        if status == 0 or shard.name not in output.replace("\n", ""):
            raise DrillFailure(f"a damaged {shard.name} was not refused by name: exit {status}, {output[-500:]}")
        shutil.rmtree(next(parent for parent in shard.parents if parent.name.startswith("step_")))
        run.seen_step = 0
        run.look()

    return stop_and_spoil


def _truncate(file: Path, chance: random.Random) -> None:
    os.truncate(file, chance.randrange(file.stat().st_size))


def _flip_bit(file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def fill_disk(run: Run, chance: random.Random) -> None:
    """No checkpoint can be written: one sentence, and nothing half-written in place."""
    status, output = run.finish()
    if status == 0 or "was not written" not in " ".join(output.split()):
        raise DrillFailure(f"a full disk did not end the run with a sentence: exit {status}, {output[-500:]}")
    if any((run.folder / "checkpoints").glob("step_*")):
        raise DrillFailure("a checkpoint is there that could not be written")


FAULTS: dict[str, Callable[[Run, random.Random], None]] = {
    "kill a rank in a step": kill_in_step,
    "kill a rank in a save": kill_in_save,
    "kill a rank while sealing": kill_in_seal,
    "a rank that hangs": hang,
    "SIGTERM to all ranks": preempt(signal.SIGTERM),
    "SIGUSR1 to all ranks": preempt(signal.SIGUSR1),
    "truncate a shard": damage(_truncate),
    "flip a bit of a shard": damage(_flip_bit),
    "fill the disk": fill_disk,
}


def drill(fault: str, run: Run, expected: dict[int, float], chance: random.Random) -> None:
    """One fault, then the same command until the run ends as if nothing had been.

    Raises:
        DrillFailure: something was lost, trusted wrongly, or came out different.
    """
    run.start(full_disk=fault == "fill the disk")
    FAULTS[fault](run, chance)
    if run.process.poll() is None:
        run.finish()
    saved = run.seen_step
    run.start()
    status, output = run.finish()
    if status:
        raise DrillFailure(f"the run did not go on: exit {status}, {output[-1500:]}")
    found = re.search(r"resumed at step (\d+)", " ".join(output.split()))
    resumed = int(found.group(1)) if found else (STEPS if saved == STEPS else 0)
    if resumed < saved:
        raise DrillFailure(f"step {saved} was saved, the run went on from step {resumed}")
    if run.losses() != expected:
        differing = sorted(s for s in expected if run.losses().get(s) != expected[s])
        raise DrillFailure(f"losses of steps {differing} differ from the undisturbed run's")


def prepare(folder: Path) -> Path:
    """Tiny data, student and teacher; returns the recipe of the run."""
    (folder / "data").mkdir()
    builder = IndexedDatasetBuilder(str(folder / "data" / "train.bin"), dtype=np.uint16)
    tokens = np.random.default_rng(0).integers(0, 160, 4000)
    for document in np.split(tokens, 20):
        builder.add_document(document.tolist(), [len(document)])
    builder.finalize(str(folder / "data" / "train.idx"))
    shutil.copy(folder / "data" / "train.bin", folder / "data" / "heldout.bin")
    shutil.copy(folder / "data" / "train.idx", folder / "data" / "heldout.idx")
    (folder / "data" / "data.json").write_text(json.dumps({"vocab_size": 160}))
    shape = dict(
        hidden_size=48, ffn_hidden_size=112, num_attention_heads=6, num_query_groups=2, kv_channels=16, vocab_size=160,
        max_position_embeddings=128, q_lora_rank=40, kv_lora_rank=24, qk_head_dim=10, qk_pos_emb_head_dim=6, v_head_dim=16,
        mamba_num_heads=6, mamba_head_dim=16, mamba_state_dim=16, linear_num_heads=2, linear_key_head_dim=18,
        linear_value_head_dim=36,
    )  # fmt: skip
    with session():
        for name, pattern in (("student", "G-+-M-*-"), ("teacher", "*-*-*-*-")):
            save_model(build_model(ModelConfig(hybrid_layer_pattern=pattern, **shape)), folder / name)
    config = TrainConfig(
        stage="distil", data=str(folder / "data"), output="given",
        model=str(folder / "student"), teacher=str(folder / "teacher"),
        sequence_length=32, global_batch_size=4, micro_batch_size=1, train_tokens=STEPS * 4 * 32, precision="fp32",
        parallel=ParallelConfig(distributed_timeout_minutes=TIMEOUT_MINUTES),
        eval_windows=2, checkpoint=CheckpointSettings(save_interval=SAVE_INTERVAL),
        logging=LoggingSettings(log_interval=1, tensorboard=False),
    )  # fmt: skip
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(asdict(config)))
    return recipe


def main(drills: int = 50, ranks: int = 2, seed: int = 0, faults: list[str] | None = None) -> None:
    """Run the drills.

    Args:
        drills: how many; the faults take turns.
        ranks: data-parallel gloo ranks of the run.
        seed: of the random moments and places.
        faults: names of some of them, by default all.
    """
    chance, console, chosen = random.Random(seed), Console(), faults or list(FAULTS)
    started, done, failures = time.monotonic(), Counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = prepare(folder)
        undisturbed = Run(folder / "undisturbed", recipe, ranks)
        undisturbed.start()
        status, output = undisturbed.finish()
        expected = undisturbed.losses()
        if status or len(expected) != STEPS:
            raise SystemExit(f"the undisturbed run failed: {output[-2000:]}")
        for number in track(range(drills), "drills", console=console):
            fault = chosen[number % len(chosen)]
            run = Run(folder / f"drill_{number}", recipe, ranks)
            try:
                drill(fault, run, expected, chance)
            except DrillFailure as failure:
                failures.append({"drill": number, "fault": fault, "what": str(failure)})
                console.print(f"drill {number}, {fault}: {failure}", style="red")
            finally:
                run.kill()
            done[fault] += 1
            shutil.rmtree(run.folder, ignore_errors=True)
    table = Table("fault", "drills", "failed")
    for fault in chosen:
        table.add_row(fault, str(done[fault]), str(sum(f["fault"] == fault for f in failures)))
    console.print(table)
    result = {"drills": drills, "ranks": ranks, "by_fault": dict(done), "failures": failures}
    print(json.dumps(result | {"seconds": round(time.monotonic() - started)}))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    auto_cli(main)
