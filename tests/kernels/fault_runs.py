"""`make test-gpu-faults`: plant the faults of planted_faults.py, one at a time, and see whether GPU tests fail by them.

    python -m tests.kernels.fault_runs [--only REGEX] [--workers 8] [--output FOLDER] [--seconds 240]
    python -m tests.kernels.fault_runs --check true     # what would be run; needs no GPU

The tests of a fault are run without it first: only where this control passes are its faults planted. A fault is caught by a
failed assertion or by the error that the list names for it; another error, say of a compiler, proves nothing. Exits 1 unless
all faults are caught. FOLDER/results.json has the results so far, FOLDER/logs what pytest printed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

from jsonargparse import auto_cli

from tests.kernels.planted_faults import FAULTS, ROOT, Fault, Selection

COPIED = ("megatron_hylo", "tests", "pyproject.toml")  # what these tests need of the repository


@dataclass
class Outcome:
    """Tests that were run once, with a fault or as a control."""

    name: str
    tests: Selection
    fault: Fault | None
    result: str  # of a fault: caught, NOT CAUGHT, or one of a control's but for "passed"
    failed_test: str = ""
    message: str = ""  # first line of the error
    seconds: float = 0.0


def judge(code: int | None, output: str, fault: Fault | None) -> tuple[str, str, str]:
    """Return (result, test that failed, first line of its error).

    Args:
        code: exit status of pytest, None where it was stopped.
        output: all that it printed.
        fault: planted one; None for a control.
    """
    failed, error = re.search(r"^FAILED (\S+)", output, re.M), re.search(r"^E +(\S.*)$", output, re.M)
    found = failed[1] if failed else "", error[1] if error else ""
    if code is None:
        return "stopped after too long", *found
    if code == 0:
        passed = re.search(r"\b\d+ passed\b", output)
        return ("skipped" if not passed else "NOT CAUGHT" if fault else "passed"), *found
    if code != 1 or failed is None:
        return f"pytest ended with {code}", *found
    if fault is None:
        return "failed", *found
    shown = re.match(r"assert\b|AssertionError\b", found[1]) or (fault.error and fault.error in found[1])
    return ("caught" if shown else "failed by another error"), *found


def run_tests(name: str, tests: Selection, fault: Fault | None, logs: Path, seconds: float) -> Outcome:
    """Run the tests in a copy of the repository, with the fault if there is one."""
    with tempfile.TemporaryDirectory(prefix="hylo_fault_") as scratch:
        copy = Path(scratch, "repository")
        copy.mkdir()
        for part in (ROOT / part for part in COPIED):
            if part.is_dir():
                shutil.copytree(part, copy / part.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(part, copy)
        if fault:
            fault.plant(copy)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(copy), os.environ.get("PYTHONPATH")])),
            "MEGATRON_HYLO_CACHE": f"{scratch}/cache", "HYLO_AUTOTUNE": "never", "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",  # pytest's summary is cut to this width
        }  # fmt: skip
        command = [sys.executable, "-m", "pytest", *tests.command, "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
        log, began = logs / f"{re.sub(r'\W+', '_', name)}.log", time.monotonic()
        with open(log, "w") as out:
            try:
                code = subprocess.run(
                    command, cwd=copy, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=seconds
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
        took = time.monotonic() - began
    return Outcome(name, tests, fault, *judge(code, log.read_text(errors="replace"), fault), took)


def main(
    only: str = "", workers: int = 8, output: Path = Path("runs/gpu_faults"), seconds: float = 240, check: bool = False
) -> None:
    """Run the controls, and the faults of those that pass.

    Args:
        only: regular expression; faults whose name has it are planted, by default all.
        workers: processes that share the GPU.
        output: folder of results and logs.
        seconds: time limit of each call of pytest.
        check: print what would be run instead.
    """
    chosen = {name: fault for name, fault in FAULTS.items() if re.search(only, name)}
    if not chosen:
        raise SystemExit(f"error: no fault's name has {only!r}; the names are:\n" + "\n".join(FAULTS))
    controls = list(dict.fromkeys(fault.tests for fault in chosen.values()))
    if check:
        for tests in controls:
            print("\n    ".join([f"{tests.file} -k '{tests.expression}'", *(n for n, f in chosen.items() if f.tests == tests)]))
        print(f"{len(controls)} controls, {len(chosen)} faults")
        return
    logs = output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    began, outcomes, pool = time.monotonic(), list[Outcome](), ThreadPoolExecutor(workers)
    try:
        pending = {pool.submit(run_tests, f"control: {' '.join(tests)}", tests, None, logs, seconds) for tests in controls}
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for outcome in (future.result() for future in done):
                outcomes.append(outcome)
                print(f"{outcome.result}: {outcome.name} | {outcome.message[:120]} | {outcome.seconds:.0f} s", flush=True)
                if outcome.fault is None and outcome.result == "passed":
                    pending |= {
                        pool.submit(run_tests, name, fault.tests, fault, logs, seconds)
                        for name, fault in chosen.items()
                        if fault.tests == outcome.tests
                    }
            (output / "results.part").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
            (output / "results.part").replace(output / "results.json")
    finally:
        pool.shutdown(cancel_futures=True)
    results = Counter(("fault " if outcome.fault else "control ") + outcome.result for outcome in outcomes)
    results["fault without a control that passed"] = len(controls) + len(chosen) - len(outcomes)
    print(", ".join(f"{kind}: {count}" for kind, count in results.items() if count), f"in {time.monotonic() - began:.0f} s")
    sys.exit(results["fault caught"] != len(chosen))


if __name__ == "__main__":
    auto_cli(main)
