"""Every patch of platform/cpu.py is needed: a training step that works with all of them fails without that one.

This file is also the program that makes the steps: it forks the ranks of every case, which are told apart by the patch they
leave out.
"""

import json
import multiprocessing.connection
import os
import re
import sys
import traceback
from pathlib import Path

import pytest

from tests.forked import Program
from tests.ports import free_port


def train_and_resume(folder: Path, stages: int) -> None:
    """One step of a tiny hybrid on that many pipeline stages, a checkpoint, and a step resumed from it."""
    import torch
    from megatron.core import parallel_state

    from megatron_hylo.config import ParallelConfig
    from megatron_hylo.config.train import OptimizerSettings, TrainConfig
    from megatron_hylo.models.hylo_model import build_model
    from megatron_hylo.platform.distributed import initialize
    from megatron_hylo.train.checkpoint import CheckpointSaver, checkpoint_path, load_checkpoint
    from megatron_hylo.train.objectives import get_objective
    from megatron_hylo.train.optimizer import build_training_state
    from tests.conftest import tiny_config

    parallel = ParallelConfig(pipeline_model_parallel_size=stages)
    initialize(parallel)
    config = TrainConfig(
        stage="pretrain", data="-", output="-", scratch="-", sequence_length=8, global_batch_size=2, train_tokens=64,
        precision="fp32", parallel=parallel, optimizer=OptimizerSettings(use_distributed_optimizer=False),
    )  # fmt: skip
    objective = get_objective(config, None)
    micro_batches = config.micro_batches(parallel_state.get_data_parallel_world_size())
    experts = dict(num_moe_experts=4, moe_ffn_hidden_size=40, moe_router_topk=2)
    architecture = tiny_config("G-+-M-*E", untie_embeddings_and_output_weights=False, **experts)

    def step(state) -> None:
        ids = torch.randint(160, (micro_batches, 1, 9))
        state.wrapped[0].zero_grad_buffer()
        state.optimizer.zero_grad()
        objective.forward_backward([state], iter([{"input_ids": i[:, :-1], "labels": i[:, 1:]} for i in ids]), micro_batches)
        success, norm, _ = state.optimizer.step()
        assert success and norm > 0
        state.scheduler.step(1)

    first, second = (build_training_state([build_model(architecture, parallel)], config) for _ in range(2))
    step(first)
    saver, path = CheckpointSaver(folder, [{}], None, keep=1), checkpoint_path(folder, 1)
    saver.start([first], 1, 2)
    saver.finish()
    assert load_checkpoint([second], path) == (1, 2)
    for name, p in second.chunks[0].named_parameters():
        assert torch.equal(p, first.chunks[0].get_parameter(name)), name
    step(second)


def run_rank(rank: int, ranks: int, skip: str, port: int, error: Path) -> None:
    """One rank of a case, in a forked process; what went wrong is left in `error`."""
    from megatron_hylo.platform import cpu, distributed

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.install_cpu_patches = lambda: cpu.install_cpu_patches(skip=(skip,))
    try:
        train_and_resume(error.parent, stages=ranks)
        error.write_text("")
    except Exception:
        error.write_text("\n".join(traceback.format_exc().strip().splitlines()[-30:]))


def run_case(ranks: int, skip: str, folder: Path) -> list[str]:
    """Tracebacks of the ranks that failed."""
    folder.mkdir()
    port = free_port()
    errors = [folder / f"error_{rank}" for rank in range(ranks)]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run_rank, args=(i, ranks, skip, port, errors[i])) for i in range(ranks)]
    for process in processes:
        process.start()
    multiprocessing.connection.wait([process.sentinel for process in processes], timeout=120)
    failed = any(error.exists() and error.read_text() for error in errors)
    for process in processes:
        process.join(timeout=2 if failed else 120)  # a rank whose partner failed waits for it in vain
        process.kill()
        process.join()
    texts = [error.read_text() if error.exists() else "" for error in errors]
    unfinished = [] if all(error.exists() for error in errors) else ["never finished"]
    return [text for text in texts if text] or unfinished


def main(ranks: int, folder: Path, names: list[str]) -> None:
    """Leave out one patch after another; FOLDER/outcomes.json is name -> tracebacks."""
    import tests.conftest  # noqa: F401  imported once, for all forks
    from megatron_hylo.platform.cpu import is_installed

    assert not any(map(is_installed, names))
    outcomes = {name: run_case(ranks, name, folder / name) for name in names}
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


def launch(ranks: int, names: tuple[str, ...], folder: Path) -> dict[str, list[str]]:
    """`main` in a process in which no patch is in force yet and that sees no GPU."""
    program = Program("tests.platform.test_cpu_patches", [ranks, folder, *names], folder / "log")
    assert program.wait(timeout=600) == 0, (folder / "log").read_text()[-4000:]
    return json.loads((folder / "outcomes.json").read_text())


# patch: what the traceback of a run without it says
NO_DRIVER = "NVIDIA driver|CUDA driver version is insufficient|not compiled with CUDA|No CUDA GPUs"
ONE_RANK = {
    "current_device": NO_DRIVER,
    "random_state": NO_DRIVER,
    "synchronize": NO_DRIVER,
    "current_stream": NO_DRIVER,
    "token_dispatch": NO_DRIVER,
    "factories": NO_DRIVER,
    "tensor_type": "torch.cuda.FloatTensor",
}
TWO_STAGES = {"synchronize": NO_DRIVER, "tensor_cuda": NO_DRIVER}


@pytest.fixture(scope="module")
def one_rank_outcomes(tmp_path_factory):
    return launch(1, ("nothing", *ONE_RANK), tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two_stage_outcomes(tmp_path_factory):
    return launch(2, ("nothing", *TWO_STAGES), tmp_path_factory.mktemp("two"))


def test_every_patch_is_covered():
    from megatron_hylo.platform.cpu import PATCHES

    assert {patch.name for patch in PATCHES} == set(ONE_RANK) | set(TWO_STAGES)


@pytest.mark.parametrize("patch", ["nothing", *ONE_RANK])
def test_one_rank(one_rank_outcomes, patch):
    check(patch, one_rank_outcomes[patch], ONE_RANK)


@pytest.mark.multirank
@pytest.mark.parametrize("patch", ["nothing", *TWO_STAGES])
def test_two_pipeline_stages(two_stage_outcomes, patch):
    check(patch, two_stage_outcomes[patch], TWO_STAGES)


def check(patch: str, errors: list[str], expected: dict[str, str]) -> None:
    """Nothing left out: no error. A patch left out: Megatron-Core asked for CUDA."""
    if patch == "nothing":
        assert not errors
        return
    assert errors
    for error in errors:
        print(patch, *re.findall(r'(megatron/core/.*)", (line \d+)', error)[-1:], error.splitlines()[-1])
        assert "megatron/core/" in error and re.search(expected[patch], error), error


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
