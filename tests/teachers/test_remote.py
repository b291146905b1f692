"""A teacher of another torchrun world gives the same losses, gradients and weights as one on the student's ranks."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.teachers.remote import Connection
from tests.conftest import tiny_config
from tests.forked import Ranks
from tests.parity.cases import PARALLELISMS, case_config, make_dataset, make_model
from tests.parity.worker import job, launch
from tests.ports import free_port
from tests.train.runs import relative_difference

pytestmark = pytest.mark.multirank
SERVERS = {"one": (1, []), "tp2_sp": (2, ["--tensor_model_parallel_size", "2", "--sequence_parallel"]),
           "cp2": (2, ["--context_parallel_size", "2"]), "two": (2, [])}  # fmt: skip
SLOW = pytest.mark.slow
# server, student's stage and parallelism: each of either side once, a student that comes after another, packed documents
CASES = [
    ("tp2_sp", "distil", "one"), ("tp2_sp", "packed_distil", "tp2_sp"), ("tp2_sp", "distil", "cp2_gather"),
    ("tp2_sp", "distil", "pp2"), ("tp2_sp", "distil", "dp2"), ("cp2", "packed_distil", "cp2_a2a"), ("cp2", "distil", "tp2"),
    pytest.param("one", "distil", "dp2", marks=SLOW), pytest.param("two", "distil", "dp2", marks=SLOW),
]  # fmt: skip


@contextlib.contextmanager
def serving(root: Path, server: str) -> Iterator[str]:
    """`hylo serve-teacher` on its ranks; yields its address."""
    ranks, options = SERVERS[server]
    address = f"127.0.0.1:{free_port()}"
    (root / server).mkdir()
    started = Ranks("megatron_hylo.cli", ["serve-teacher", root / "teacher", address, *options], ranks, root / server)
    try:
        yield address
        assert started.statuses() == [None] * ranks, started.said()  # it survives its students
    finally:
        started.kill()


@pytest.fixture(scope="module")
def measured(request, tmp_path_factory, one_rank) -> Path:
    """ROOT/{server}-{stage}-{parallelism}.pt of the cases that were chosen, "online" among the servers."""
    root = tmp_path_factory.mktemp("remote")
    items = [item.callspec.params for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    cases = [tuple(chosen[name] for name in ("server", "stage", "parallelism")) for chosen in items]
    make_dataset(root / "data")
    make_model(tiny_config("*-*-*-*-", add_qkv_bias=True, vocab_size=161), root / "teacher", seed=1)
    student = tiny_config("G-+-M-*-", qk_layernorm=True, add_qkv_bias=True, model_family="qwen3", vocab_size=161)
    make_model(student, root / "mixed", seed=2)  # a vocabulary that two ranks do not divide
    online = [job("measure", case_config(root, "mixed", stage, "one", 4), root / f"online-{stage}-one.pt", evaluated=False)
              for stage in ("distil", "packed_distil")]  # fmt: skip
    with contextlib.ExitStack() as stack:
        addresses = {server: stack.enter_context(serving(root, server)) for server in dict.fromkeys(case[0] for case in cases)}
        for ranks in (1, 2):
            jobs = online if ranks == 1 else []
            for server, stage, parallelism in cases:
                config = case_config(root, "mixed", stage, parallelism, 4)
                parallel = replace(config.parallel, distributed_timeout_minutes=1.5)
                config = replace(config, teacher=None, teacher_address=addresses[server], parallel=parallel)
                if PARALLELISMS[parallelism][0] == ranks:
                    jobs.append(job("measure", config, root / f"{server}-{stage}-{parallelism}.pt", evaluated=False))
            launch(jobs, ranks, root)
        time.sleep(1)
    return root


@pytest.mark.parametrize(("server", "stage", "parallelism"), CASES)
def test_equals_a_teacher_on_the_same_ranks(measured, server, stage, parallelism):
    here, online = (torch.load(measured / f"{name}.pt") for name in (f"{server}-{stage}-{parallelism}", f"online-{stage}-one"))
    for mine, theirs in zip(here["steps"], online["steps"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    for what in ("gradients", "weights"):
        difference, name = relative_difference(here[what][0], online[what][0])
        print(f"{server} | {stage} | {parallelism} | {what} | {difference:.1e}")
        assert difference < 1e-5, name


def test_nobody_at_the_address_is_said():
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(ConfigError, match=f"no teacher answers at {address}.*start `hylo serve-teacher` first"):
        Connection(address, 0, "a test", 1.0)
    with pytest.raises(ConfigError, match="'nowhere' must be HOST:PORT"):
        Connection("nowhere", 0, "a test", 1.0)
    common = dict(data="-", output="-", model="-")
    with pytest.raises(ConfigError, match="teacher_address is for stage distil"):
        TrainConfig(stage="align", teacher_address="a:1", **common)
    with pytest.raises(ConfigError, match="give one of them"):
        TrainConfig(stage="distil", teacher_address="a:1", teacher_store="b", **common)
