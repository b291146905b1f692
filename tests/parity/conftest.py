"""One rank and many, measured: the runs that a file's selected cases need, and the table of what was found.

Oracle: the same fp32 model folder trained on one rank. Parallelisms load it, see the same global batches (whatever number
of data-parallel ranks shares them) and go through the training loop's own functions; see worker.py.
"""

from pathlib import Path

import pytest
import torch

from megatron_hylo.convert.to_hf import convert_megatron_to_hf
from megatron_hylo.teachers.store_writer import write_store
from tests.parity.cases import (
    MODELS,
    PARALLELISMS,
    STAGES,
    case_config,
    global_batch_size,
    make_dataset,
    make_model,
    teacher_of,
)
from tests.parity.faults import FAULTS
from tests.parity.worker import job, launch

pytest.register_assert_rewrite("tests.parity.measured")
from tests.parity.measured import Case, file_of, oracle_of  # noqa: E402

# A second step, from what the first one wrote and with the next batch, is taken once for each objective.
TWO_STEPS = ("pretrain", "distil", "mse", "ild", "sequential")
# Stages whose evaluation differs; another evaluates as one of these does (without or with a teacher, whole or packed).
EVALUATED = ("pretrain", "packed", "distil", "packed_distil", "windows", "packed_windows", "recall")


HF = "hf"  # a case's models are read from Hugging Face folders too


def selected(request: pytest.FixtureRequest) -> tuple[list[Case], list[str]]:
    """(cases, planted faults) of the file's tests that were selected, so that `-k` costs no others."""
    specs = [item.callspec.params for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    cases = dict.fromkeys((spec["model"], spec["stage"], spec["parallelism"]) for spec in specs if "model" in spec)
    return list(cases), [spec["fault"] for spec in specs if "fault" in spec]


def hf_cases(request: pytest.FixtureRequest) -> list[Case]:
    """Cases among the selected ones that are measured a second time, from Hugging Face folders."""
    specs = [item.callspec.params for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return [(spec["model"], spec["stage"], spec["parallelism"]) for spec in specs if spec.get("source") == HF]


def make_folders(root: Path, cases: list[Case]) -> None:
    """Text, the models of the cases, their teachers and those teachers' stores."""
    make_dataset(root / "data")
    make_dataset(root / "chat", answers=True)
    teachers = dict.fromkeys(teacher_of(model, stage) for model, stage, _ in cases)
    for name in dict.fromkeys([*(model for model, _, _ in cases), *filter(None, teachers)]):
        make_model(MODELS[name], root / name, seed=1 if name.endswith("teacher") else 2)
    for teacher in dict.fromkeys(teacher_of(model, stage) for model, stage, _ in cases if "teacher_store" in STAGES[stage]):
        folders = (root / str(teacher), root / "data", root / f"{teacher}_store")
        write_store(*folders, sequence_length=48, precision=torch.float32)


@pytest.fixture(scope="module")
def measured(request, tmp_path_factory, one_rank) -> Path:
    """Folder with the files `file_of` and `oracle_of` of the selected cases, and `{fault}.pt` of the planted faults."""
    cases, faults = selected(request)
    all_cases = [*cases, *(FAULTS[fault][1:] for fault in faults)]
    root = tmp_path_factory.mktemp("parity")
    make_folders(root, all_cases)

    def measure(case: Case, parallelism: str, file: Path, fault: str | None = None) -> tuple[int, dict]:
        model, stage, _ = case
        config = case_config(root, model, stage, parallelism, global_batch_size(*case[1:]))
        steps = 2 if stage in TWO_STEPS and not fault else 1  # a fault has to show in the gradients of the first
        return PARALLELISMS[parallelism][0], job("measure", config, file, fault, steps, stage in EVALUATED)

    whole = [(model, "distil", parallelism) for model, stage, parallelism in cases if stage == "top_k"]  # compared with it
    oracles = {oracle_of(root, case): case for case in (*all_cases, *whole)}
    jobs = [measure(case, "one", file) for file, case in oracles.items()]
    jobs += [measure(case, case[2], file_of(root, case)) for case in cases]
    for case in hf_cases(request):
        ranks, made = measure(case, case[2], file_of(root, (f"{HF}_{case[0]}", *case[1:])))
        for name in ("model", "teacher"):
            if made["config"][name]:
                convert_megatron_to_hf(made["config"][name], root / HF / Path(made["config"][name]).name, verify=False)
                made["config"][name] = f"hf:{root / HF / Path(made['config'][name]).name}"
        jobs.append((ranks, made))
    jobs += [measure(FAULTS[fault][1:], FAULTS[fault][3], root / f"{fault}.pt", fault) for fault in faults]
    for ranks in sorted({ranks for ranks, _ in jobs}):
        mine = [job for needed, job in jobs if needed == ranks]
        mine.sort(key=lambda job: str(job["config"]["parallel"]))  # process groups are made anew where they change
        launch(mine, ranks, root)
    return root


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the table of errors and of the planted faults, where -s asks for it; workers of xdist cannot print it."""
    if terminalreporter.config.option.capture == "no":
        for report in terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", []):
            for name, row in report.user_properties if report.when == "call" else ():
                if name == "parity":
                    terminalreporter.write_line(row)
