"""Assertions of the tests of tests/parity about files that worker.py wrote."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_hylo.plan.schedule import order
from tests.parity.cases import PARALLELISMS, STAGES, global_batch_size
from tests.parity.faults import FAULTS
from tests.train.runs import relative_difference

Case = tuple[str, str, str]  # model, stage, parallelism
Record = Callable[[str, object], None]
GRADIENT, WEIGHT, LOSS = 1e-5, 1e-5, 2e-6  # relative; gradients and weights by the norm of each tensor


def cases(model: str, stages: str, parallelisms: str) -> list[Case]:
    """A model in each of the stages under each of the parallelisms, both named in one string."""
    return [(model, stage, parallelism) for stage in stages.split() for parallelism in parallelisms.split()]


def parametrize(always: list[Case], slow: list[Case]) -> pytest.MarkDecorator:
    """Tests of `always`, and of those of `slow` that are not among them: of code that `always` covers, once more."""
    assert len(set(always)) == len(always)
    more = [pytest.param(*case, marks=pytest.mark.slow) for case in dict.fromkeys(slow) if case not in always]
    return pytest.mark.parametrize(("model", "stage", "parallelism"), [*always, *more], ids=lambda value: value)


def parametrize_faults(kind: str, always: list[Case]) -> pytest.MarkDecorator:
    """Planted faults of a kind of stage; each one's case must be among those that are always run."""
    found = [name for name, (_, _, stage, _) in FAULTS.items() if STAGES[stage]["stage"] == kind]
    assert all(FAULTS[name][1:] in always for name in found)
    return pytest.mark.parametrize("fault", found)


def file_of(root: Path, case: Case) -> Path:
    """File with what was measured of a case."""
    return root / f"{'-'.join(case)}.pt"


def oracle_of(root: Path, case: Case) -> Path:
    """File with what was measured of its model and stage on one rank, with the same global batches."""
    model, stage, parallelism = case
    return root / f"{model}-{stage}-one-{global_batch_size(stage, parallelism)}.pt"


def assert_equals_one_rank(root: Path, case: Case, record: Record) -> None:
    """Losses, norms, evaluation, gradients and weights of a case are those of one rank, and its ranks agree."""
    here, one = (torch.load(file) for file in (file_of(root, case), oracle_of(root, case)))
    for mine, theirs in zip(here["steps"], one["steps"], strict=True):
        norms = [{name: step.pop(name) for name in list(step) if name.startswith("gradient_norm")} for step in (mine, theirs)]
        assert norms[0] == pytest.approx(norms[1], rel=GRADIENT)
        by_kind = [norm for name, norm in norms[0].items() if "/" in name]
        assert len(by_kind) > 2 and math.hypot(*by_kind) == pytest.approx(norms[0]["gradient_norm"], rel=1e-6)
        assert mine == pytest.approx(theirs, rel=LOSS)
    for mine, theirs in zip(here["quality"], one["quality"], strict=True):
        assert mine == pytest.approx(theirs, rel=LOSS)
    if "passes" in here:
        assert_schedule(case, here["passes"])
    for what, tolerance in (("gradients", GRADIENT), ("weights", WEIGHT)):
        mine, between_ranks, where = here[what]
        assert between_ranks < tolerance, f"{what}: ranks hold different {where}"
        difference, name = relative_difference(mine, one[what][0])
        record("parity", f"{' | '.join(case)} | {what} | {difference:.1e} | {name}")
        assert difference < tolerance, f"{what}: {name}"


def assert_equals_hf_start(root: Path, case: Case) -> None:
    """Losses, gradients and weights of a case are the same, bit for bit, where Hugging Face folders are read."""
    here, folder = (torch.load(file_of(root, (name, *case[1:]))) for name in (f"hf_{case[0]}", case[0]))
    assert here["steps"] == folder["steps"] and here["quality"] == folder["quality"]
    for what in ("gradients", "weights"):
        mine, theirs = here[what][0], folder[what][0]
        assert mine.keys() == theirs.keys() and len(mine) > 20
        assert not [name for name in mine if not torch.equal(mine[name], theirs[name])]


def assert_schedule(case: Case, ranks: list[tuple[int, list[tuple]]]) -> None:
    """Every pipeline rank ran its passes in the order of the simulator of `hylo plan`."""
    groups = PARALLELISMS[case[2]][1]
    pipeline, chunks = (groups.get(f"{kind}pipeline_model_parallel_size", 1) for kind in ("", "virtual_"))
    for rank, passes in ranks:
        found = [tuple(one[:3]) for one in passes]
        micro_batches = max(number for _, _, number in found) + 1
        assert found == order(rank, pipeline, micro_batches, chunks), f"pipeline rank {rank}"


def assert_caught(root: Path, fault: str, record: Record) -> None:
    """A planted fault is far above what `assert_equals_one_rank` lets pass."""
    case = FAULTS[fault][1:]
    faulty, one = torch.load(root / f"{fault}.pt"), torch.load(oracle_of(root, case))
    (mine, between_ranks, where), theirs = faulty["gradients"], one["gradients"][0]
    difference, name = relative_difference(mine, theirs)
    norm, right = (run["steps"][0]["gradient_norm"] for run in (faulty, one))
    qualities = [[quality["cross_entropy"] for quality in run["quality"]] for run in (faulty, one)]
    evaluated = max((abs(a - b) / b for a, b in zip(*qualities)), default=0.0)
    worst, name = max(
        (difference, name), (between_ranks, where), (abs(norm - right) / right, "norm of all gradients"),
        (evaluated, "evaluation"),
    )  # fmt: skip
    record("parity", f"{fault} | {'-'.join(case)} | {worst:.1e} | {name}")
    assert worst > 100 * GRADIENT
