"""One rank of a test that needs several: runs a list of jobs, each under its own parallelism.

Started by `launch` through `python -m megatron_hylo.train.launch --standalone --nproc-per-node N tests/parity/worker.py JOBS`,
so that one start-up of Python and Megatron-Core serves many cases. A job is made by `job`; its kinds:
  measure   gradients, weights and metrics of two steps of that configuration, as whole tensors, and an evaluation, to FILE
  copy      the model, loaded and saved under that parallelism, to the configuration's output
  store     a teacher store of the model and the data, to the configuration's output
  train     the whole of `megatron_hylo.train.loop.train`; where FILE is a checkpoint, from a copy of it
"""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.forked import run_ranks

ROOT = Path(__file__).parents[2]


def job(
    kind: str, config: Any, file: Path | None = None, fault: str | None = None, steps: int = 2, evaluated: bool = True
) -> dict[str, Any]:
    """One entry of the list that `launch` takes.

    Args:
        kind: see above.
        config: a TrainConfig.
        file: what is measured goes there.
        fault: one of faults.FAULTS to plant.
        steps: optimizer steps to measure.
        evaluated: measure an evaluation too.
    """
    common = {"kind": kind, "config": asdict(config), "file": file and str(file)}
    return common | {"fault": fault, "steps": steps, "evaluated": evaluated}


def launch(jobs: list[dict[str, Any]], ranks: int, scratch: Path, gpus: bool = False, kernels: str = "") -> None:
    """Run jobs on that many ranks and wait; what they print is in the error if one fails.

    Args:
        jobs: made by `job`.
        ranks: processes.
        scratch: folder for the job list.
        gpus: a GPU a rank and NCCL, instead of CPUs and gloo.
        kernels: implementations to force, as in HYLO_KERNELS.
    """
    file = scratch / f"jobs_{ranks}.json"
    file.write_text(json.dumps(jobs))
    if not gpus:
        run_ranks("tests.parity.worker", [str(file)], ranks, scratch, {"HYLO_KERNELS": kernels}, timeout=1500)
        return
    command = [sys.executable, "-m", "megatron_hylo.train.launch", "--standalone", "--nproc-per-node", str(ranks)]
    command += [__file__, str(file)]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HYLO_KERNELS": kernels}
    environment |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    if result.returncode:
        raise RuntimeError(f"{ranks} ranks failed:\n{result.stdout[-3000:]}\n{result.stderr[-12000:]}")


def whole_tensors(chunks: list[torch.nn.Module], tensors: list[dict[str, torch.Tensor]]) -> tuple[dict, float, str]:
    """Tensors shaped like this rank's parameters, by chunk, put together from all ranks, on rank 0; elsewhere there are none.

    While the model's own sharded state dict is made, every parameter's data is the tensor of its name; so fused
    projections come apart by section exactly as in a checkpoint.

    Returns:
        Tensors by their name in a checkpoint; the largest relative difference between ranks that hold the same
        piece, and where.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from megatron_hylo.models.checkpoint import sharded_chunks
    from megatron_hylo.models.weights_files import stored_shape

    parameters = [(p, mine[name]) for chunk, mine in zip(chunks, tensors) for name, p in chunk.named_parameters()]
    kept = [p.data for p, _ in parameters]
    for p, tensor in parameters:
        p.data = tensor
    state = sharded_chunks(chunks)
    apply_factories(state)
    pieces = [
        # tensors take long to pickle
        (t.key, t.global_shape, t.global_offset, t.data.detach().float().cpu().reshape(stored_shape(t)).numpy())
        for t in nested_values(state)
        if isinstance(t, ShardedTensor)
    ]
    for (p, _), data in zip(parameters, kept):
        p.data = data
    everyone: list = [None] * dist.get_world_size()
    dist.gather_object(pieces, everyone if dist.get_rank() == 0 else None)
    whole: dict[str, torch.Tensor] = {}
    worst = (0.0, "")
    for key, shape, offset, numbers in (entry for rank in everyone if rank is not None for entry in rank):
        piece = torch.from_numpy(numbers)
        full = whole.setdefault(key, torch.full(shape, float("nan")))
        place = full[tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))]
        if bool(place.isnan().any()):
            place.copy_(piece)
        else:
            worst = max(worst, (float((place - piece).norm() / place.norm().clamp(min=1e-30)), key))
    missing = [key for key, tensor in whole.items() if bool(tensor.isnan().any())]
    assert not missing, f"no rank has all of {missing}"
    return whole, *worst


def _reduced_gradients(state: Any) -> list[dict[str, torch.Tensor]]:
    """Gradients of all parameters, by chunk; zeros where frozen. The distributed optimizer's shards are put together first."""
    from megatron.core import parallel_state

    dense = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for name, group in (("buffers", dense), ("expert_parallel_buffers", parallel_state.get_expert_data_parallel_group())):
        if not state.wrapped[0].ddp_config.use_distributed_optimizer or group.size() == 1:
            continue
        for buffer in (buffer for wrapper in state.wrapped for buffer in getattr(wrapper, name)):
            for bucket in buffer.buckets:
                shards = list(bucket.grad_data.chunk(group.size()))
                dist.all_gather(shards, shards[group.rank()].clone(), group=group)
    return [
        {name: p.main_grad.clone() if p.requires_grad else torch.zeros_like(p) for name, p in chunk.named_parameters()}
        for chunk in state.chunks
    ]


def _quality(run: Any) -> list[dict[str, Any]]:
    """Evaluations of a student: in batches that are not all full, and of fewer windows than data-parallel ranks; or packed."""
    from megatron_hylo.eval.perplexity import HeldoutText, evaluate, evaluate_recall

    length, generator = run.config.sequence_length, torch.Generator().manual_seed(0)
    windows = torch.randint(160, (3, length + 1), generator=generator)
    (chunks,), how = run.students, dict(batch_size=2, first_bucket=8)
    if run.config.packed_documents:  # windows of several documents: quality and recall by position and by distance
        starts = [torch.tensor(places) for places in ([0], [0, 5, length // 2 + 1], [0, length - 1, length])]
        answers = torch.arange(3 * (length + 1), dtype=torch.int32).view(3, -1) % 7
        text = HeldoutText(windows, starts, answers * answers)
        found = [evaluate(chunks, text, run.teacher, **how).to_dict(), evaluate_recall(chunks, text, **how)]
    else:
        found = [evaluate(chunks, some, run.teacher, **how).to_dict() for some in (windows, windows[:1])]
    return [{name: value for name, value in measures.items() if value is not None} for measures in found]


def measure(config: Any, file: Path, count: int, evaluated: bool) -> None:
    """An evaluation, then `count` steps from the start, as the training loop makes them, and the gradients of the first."""
    from megatron.core import parallel_state

    from megatron_hylo.platform.distributed import initialize, is_main
    from megatron_hylo.train.loop import training_step
    from megatron_hylo.train.nan_guard import SkippedSteps
    from megatron_hylo.train.setup import build_run

    run = build_run(config, initialize(config.parallel, config.seed))
    (chunks,), (state,) = run.students, run.states
    quality = _quality(run) if evaluated else []
    contexts = [mixer.self_attention.context for chunk in chunks for mixer, _ in chunk.mixer_layers()]
    before = [context.received_bytes for context in contexts]  # by the evaluation
    forward_backward, found = run.objective.forward_backward, {}

    def recorded(*arguments: Any) -> Any:
        if found or run.config.parallel.pipeline_model_parallel_size == 1 or run.config.stage == "align":
            losses = forward_backward(*arguments)
        else:
            with recorded_passes() as passes:
                losses = forward_backward(*arguments)
            everyone: list = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, (parallel_state.get_pipeline_model_parallel_rank(), passes))
            found["passes"] = everyone
        if "gradients" not in found:
            found["received"] = [c.received_bytes - earlier for c, earlier in zip(contexts, before, strict=True)]
            found["gradients"] = _reduced_gradients(state)
        return losses

    run.objective.forward_backward = recorded
    batches = run.batches()
    take = partial(training_step, run.states, run.objective, batches, run.micro_batches, norms_by_kind=True)
    found["steps"] = [take(step, SkippedSteps(0)) for step in range(count)]
    found["weights"] = whole_tensors(chunks, [{name: p.data for name, p in chunk.named_parameters()} for chunk in chunks])
    # last: fp32 data in a bf16 parameter takes its gradient hooks away
    found["gradients"] = whole_tensors(chunks, found["gradients"])
    if is_main():
        torch.save(found | {"quality": quality}, file)


@contextlib.contextmanager
def recorded_passes() -> Iterator[list[tuple[str, int, int, float, float]]]:
    """Passes of this rank under Megatron-Core's schedules: (F or B, model chunk, micro-batch, start, end)."""
    from megatron.core.pipeline_parallel import schedules

    passes: list[tuple[str, int, int, float, float]] = []
    outputs: dict[int, tuple[int, int]] = {}  # of a forward pass, by identity -> its chunk and micro-batch
    forward, backward = schedules.forward_step, schedules.backward_step

    def first(tensors: Any) -> int:
        return id(tensors[0] if isinstance(tensors, list) else tensors)

    def forward_step(function: Any, iterator: Any, model: Any, *rest: Any, **named: Any) -> Any:
        start, chunk = time.perf_counter(), model.module.vp_stage or 0
        made = forward(function, iterator, model, *rest, **named)
        number = sum(kind == "F" and of == chunk for kind, of, *_ in passes)
        outputs[first(made[0])] = (chunk, number)
        passes.append(("F", chunk, number, start, time.perf_counter()))
        return made

    def backward_step(inputs: Any, made: Any, *rest: Any, **named: Any) -> Any:
        start = time.perf_counter()
        result = backward(inputs, made, *rest, **named)
        passes.append(("B", *outputs[first(made)], start, time.perf_counter()))
        return result

    schedules.forward_step, schedules.backward_step = forward_step, backward_step
    try:
        yield passes
    finally:
        schedules.forward_step, schedules.backward_step = forward, backward


def main(file: str) -> None:
    """Run the jobs of a list; process groups are made anew where the parallelism changes."""
    from megatron_hylo.config import from_dict
    from megatron_hylo.config.train import TrainConfig
    from megatron_hylo.models.checkpoint import load_chunks, save_model
    from megatron_hylo.platform.distributed import device, initialize, shutdown
    from megatron_hylo.teachers.store_writer import write_store
    from megatron_hylo.train.loop import train
    from tests.parity.faults import FAULTS

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    entries = [(e, from_dict(TrainConfig, e["config"], file)) for e in json.loads(Path(file).read_text())]
    launcher = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    for number, (_, group) in enumerate(itertools.groupby(entries, key=lambda entry: entry[1].parallel)):
        store, here = dist.PrefixStore(f"jobs_{number}", launcher), device()
        cuda = here.type == "cuda"
        if cuda:
            torch.cuda.set_device(here)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=ranks)
        for entry, config in group:
            if entry["kind"] == "measure":
                with FAULTS[entry["fault"]][0]() if entry["fault"] else contextlib.nullcontext():
                    measure(config, Path(entry["file"]), entry["steps"], entry["evaluated"])
                continue
            if entry["kind"] in ("copy", "store"):
                initialize(config.parallel, config.seed)
                if entry["kind"] == "copy":
                    save_model(load_chunks(config.model, config.parallel), config.output)
                else:
                    arguments = dict(precision=torch.float32, parallel=config.parallel)
                    write_store(config.model, config.data, config.output, sequence_length=48, **arguments)
                continue
            if entry["file"] is not None and rank == 0:
                shutil.copytree(entry["file"], Path(config.output) / "checkpoints" / Path(entry["file"]).name)
            dist.barrier()
            train(config)
        shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
