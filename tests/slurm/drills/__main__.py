"""`make slurm-test`: the scripts of slurm/ under a real Slurm, preempted, timed out, requeued and robbed of nodes.

    python -m tests.slurm.drills [--only TEXT] [--random N] [--keep FOLDER] [--quickstart RUN]

Prints a table of drills; exits 1 where one has failed, 0 where all is well or no Slurm can be started here. With the same
FOLDER it goes on where it was: drills that ended well are not taken again.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from megatron_hylo.platform.distributed import session
from tests.slurm.drills.cluster import Cluster, missing
from tests.slurm.drills.drills import DRILLS, random_drills
from tests.slurm.drills.lab import Lab, Outcome
from tests.slurm.drills.several import SEVERAL, first_steps, several_jobs
from tests.slurm.tiny_root import make_root, make_stage1


def main() -> int:
    """Start a cluster, take the drills, print and keep a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="drills whose name has this text, or one of several with ; between them")
    parser.add_argument("--random", type=int, default=0, help="so many more, at random moments")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder that logs and runs are kept in")
    parser.add_argument(
        "--quickstart", type=Path, help="folder of `hylo quickstart`, whose 135M model is timed to its first step"
    )
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that no daemon stays
    if (reason := missing()) is not None:
        print(f"skipped: {reason}")
        return 0
    scratch = tempfile.TemporaryDirectory(prefix="hylo_slurm_test_")
    folder = given.keep or Path(scratch.name)
    Path(scratch.name).chmod(0o755)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "root" / "models" / "llama3.2-1b-4mla12gdn").is_dir():  # kept, it serves again
        with session():
            make_root(folder / "root")
            make_stage1(folder / "root")
    for made in (folder / "cluster", folder / "root" / "runs"):  # of an earlier call
        shutil.rmtree(made, ignore_errors=True)
    outcomes: list[Outcome] = []
    table = folder / "drills.txt"
    done = {
        row[:58].strip() for row in (table.read_text().splitlines() if table.is_file() else ()) if row[59:].startswith(GOOD)
    }
    with Cluster(folder / "cluster") as cluster, open(table, "a", buffering=1) as log:
        lab = Lab(cluster, folder / "root", given.seed)

        def take(outcome: Outcome) -> None:
            outcomes.append(outcome)
            for stream in (sys.stdout, log):
                print(line(outcome), file=stream, flush=True)

        begun = time.monotonic()
        for stream in (sys.stdout, log):
            print(HEAD, file=stream, flush=True)
        only = [text.strip().lower() for text in given.only.split(";")]
        for drill in [*DRILLS, *random_drills(given.random)]:
            if drill.name not in done and any(text in drill.name.lower() for text in only):
                take(lab.run(drill))
        for outcome in several_jobs(lab, [name for name in SEVERAL if name not in done and any(t in name for t in only)]):
            take(outcome)
        if given.quickstart:
            for outcome in first_steps(lab, given.quickstart.absolute()):
                take(outcome)
        bad = [outcome for outcome in outcomes if outcome.problems]
        end = (
            f"{len(done) + len(outcomes)} drills, {len(bad)} failed, {time.monotonic() - begun:.0f} s"
            + (f"; runs, logs and this table in {folder}" if given.keep else "")
        )  # fmt: skip
        for stream in (sys.stdout, log):
            print(end, file=stream)
        if bad and not given.keep:
            for outcome in bad:
                print(f"--- {outcome.name}")
                for file in sorted((folder / "root" / "runs").glob("*.out"))[-3:]:
                    print(f"{file.name}: {file.read_text(errors='replace')[-2000:]}")
    scratch.cleanup()
    return 1 if bad else 0


GOOD = "as before"
HEAD = f"{'drill':58} {'outcome':8} {'seconds':>7} {'starts':>6} {'requeued':>8} {'retried':>7} {'repeated':>8}"


def line(o: Outcome) -> str:
    """Row of the table."""
    why = f"  {'; '.join(o.problems)}" if o.problems else f"  {o.note}" if o.note else ""
    outcome = "FAILED" if o.problems else GOOD
    return f"{o.name:58} {outcome:9} {o.seconds:6.0f} {o.starts:6} {o.requeues:8} {o.retries:7} {o.repeated:8}{why}"


if __name__ == "__main__":
    sys.exit(main())
