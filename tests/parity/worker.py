"""One rank of a test that needs several: runs a list of jobs, each under its own parallel layout.

Started by `launch` through `python -m torch.distributed.run --standalone --nproc-per-node N tests/parity/worker.py JOBS`,
so that one start-up of Python and Megatron-Core serves many cases. A job is {"kind", "config", "folder"}:
  measure   FOLDER/gradients, FOLDER/weights, FOLDER/measured.json of two steps of that configuration
  train     the whole of `megatron_hylo.train.loop.train`
Gradients are stored like weights: for the time of the save every parameter's data is its reduced gradient, so the
model's own sharded state dict puts the shards of fused projections in their places.
"""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Iterator

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]


def job(kind: str, config: Any, folder: Path | None = None) -> dict[str, Any]:
    """One entry of the list that `launch` takes; `config` is a TrainConfig."""
    return {"kind": kind, "config": asdict(config), "folder": str(folder)}


def launch(jobs: list[dict[str, Any]], ranks: int, scratch: Path) -> None:
    """Run jobs on that many ranks and wait; what they print is in the error if one fails.

    Args:
        jobs: made by `job`.
        ranks: processes.
        scratch: folder for the job list.
    """
    file = scratch / f"jobs_{ranks}.json"
    file.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__, str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if result.returncode:
        raise RuntimeError(f"{ranks} ranks failed:\n{result.stdout[-3000:]}\n{result.stderr[-12000:]}")


@contextlib.contextmanager
def _gradients_as_weights(model: torch.nn.Module, gradients: dict[str, torch.Tensor]) -> Iterator[None]:
    kept = {name: p.data for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.data = gradients[name]
    yield
    for name, p in model.named_parameters():
        p.data = kept[name]


def _reduced_gradients(state: Any) -> dict[str, torch.Tensor]:
    """Gradients of all parameters; zeros where frozen. The distributed optimizer's shards are put together first."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group()
    if state.model.ddp_config.use_distributed_optimizer and group.size() > 1:
        for buffer in state.model.buffers:
            for bucket in buffer.buckets:
                shards = list(bucket.grad_data.chunk(group.size()))
                dist.all_gather(shards, shards[group.rank()].clone(), group=group)
    named = state.bare_model.named_parameters()
    return {name: p.main_grad.clone() if p.requires_grad else torch.zeros_like(p) for name, p in named}


def _replica_difference(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest relative difference between ranks that should hold the same tensor, and its name."""
    from megatron.core import parallel_state

    worst = (0.0, "")
    for name, p in model.named_parameters():
        groups = [parallel_state.get_data_parallel_group()]
        if not getattr(p, "tensor_model_parallel", False):
            groups.append(parallel_state.get_tensor_model_parallel_group())
        for group in groups:
            mean = tensors[name].clone()
            dist.all_reduce(mean, group=group)
            mean /= group.size()
            difference = float((tensors[name] - mean).norm() / mean.norm().clamp(min=1e-30))
            worst = max(worst, (difference, name))
    return worst


def measure(config: Any, folder: Path) -> None:
    """Gradients of one global batch, then two optimizer steps from the start, as the training loop makes them."""
    from megatron.core import parallel_state

    from megatron_hylo.data.packed import PackedDataset, batches
    from megatron_hylo.models.checkpoint import save_weights, sharded_weights
    from megatron_hylo.platform.distributed import initialize, is_main
    from megatron_hylo.train.loop import _build_models, _step
    from megatron_hylo.train.optimizer import build_training_state, choose_trainable
    from megatron_hylo.train.stages import get_stage

    initialize(config.parallel, config.seed)
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    model, teacher = _build_models(config)
    stage = get_stage(config, teacher)
    stage.check(model)
    choose_trainable(model, config)
    state = build_training_state(model, config)
    dataset = PackedDataset(f"{config.data}/train", config.sequence_length, config.seed)
    micro_batches = config.micro_batches(ranks)

    state.model.zero_grad_buffer()
    stage.forward_backward(state, batches(dataset, 0, config.micro_batch_size, rank, ranks), micro_batches)
    gradients = _reduced_gradients(state)
    with _gradients_as_weights(model, gradients):
        save_weights({"model": sharded_weights(model)}, folder / "gradients")
    gradient_replicas = _replica_difference(model, gradients)

    feed = batches(dataset, 0, config.micro_batch_size, rank, ranks)
    steps = [_step(state, stage, feed, micro_batches, step) for step in range(2)]
    save_weights({"model": sharded_weights(model)}, folder / "weights")
    replicas = [gradient_replicas, _replica_difference(model, {n: p.data for n, p in model.named_parameters()})]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, replicas)
    if is_main():
        worst = {name: max(r[i] for r in everyone) for i, name in enumerate(("gradients", "weights"))}
        (folder / "measured.json").write_text(json.dumps({"steps": steps, "replicas": worst}))


def main(file: str) -> None:
    """Run the jobs of a list, each after leaving the former's parallel groups."""
    from megatron.core import parallel_state

    from megatron_hylo.config import from_dict
    from megatron_hylo.train.config import TrainConfig
    from megatron_hylo.train.loop import train

    dist.init_process_group("gloo")
    for entry in json.loads(Path(file).read_text()):
        config = from_dict(TrainConfig, entry["config"], file)
        train(config) if entry["kind"] == "train" else measure(config, Path(entry["folder"]))
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
