"""Set up and tear down one rank: device, process groups, Megatron-Core's parallel state and random seeds.

The same call serves one plain process, `torchrun` on the CPU (gloo) and `torchrun` on GPUs (NCCL).
"""

import contextlib
import functools
import logging
import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, Iterator

import torch

from megatron_hylo.config import ConfigError, ParallelConfig
from megatron_hylo.platform.cpu import install_cpu_patches
from megatron_hylo.platform.limits import check_address_space

logger = logging.getLogger("megatron_hylo.platform")
DEVICES = Path("/dev")  # where NVIDIA's driver has a file for each GPU: nvidia0, ...


def device() -> torch.device:
    """Return this rank's device: its GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def gpu_names() -> list[str]:
    """Name this machine's visible GPUs as CUDA_VISIBLE_DEVICES does: by number, or as it has them where it is set."""
    found, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(number) for number in range(found)] if named is None else [name.strip() for name in named.split(",")][:found]


def rank() -> int:
    """Return the global rank; before initialisation torchrun's RANK, else 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is rank 0, which prints and writes summaries."""
    return rank() == 0


def initialize(parallel: ParallelConfig | None = None, seed: int = 1234) -> torch.device:
    """Initialise torch.distributed and Megatron-Core on this rank; safe to call again with the same sizes.

    Without torchrun's environment variables it creates a world of one rank. At one tensor_model_parallel_size, randomly
    initialised weights depend on `seed` alone.

    Args:
        parallel: sizes of the parallel groups; one rank each by default.
        seed: seed of the CPU and tensor-parallel generators.

    Returns:
        The device of this rank.

    Raises:
        ConfigError: the world size is not divisible by the sizes of the groups, there are more ranks on this machine than
            GPUs, or `ulimit -v` is too low to make the groups.
    """
    parallel = parallel or ParallelConfig()
    install_cpu_patches()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state, tensor_parallel
    here = device()
    if here.type == "cuda":
        if here.index >= (count := torch.cuda.device_count()):
            raise ConfigError(
                f"rank {rank()} is number {here.index} of this machine (LOCAL_RANK), which has {count} visible GPUs; start as "
                f"many ranks as GPUs: torchrun --nproc-per-node {count}"
            )
        torch.cuda.set_device(here)
        os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")  # autotuning takes minutes; keep its results on disk
    elif message := unseen_gpus():
        _warn_once(message)
    if not torch.distributed.is_initialized():
        check_address_space()
        backend = "nccl" if here.type == "cuda" else "gloo"
        # no device_id: with it NCCL splits every group off one communicator, and two ranks hung while destroying them
        # (pytorch issue 190396)
        _keep_gloo_local()
        settings: dict[str, Any] = dict(backend=backend, timeout=timedelta(minutes=parallel.distributed_timeout_minutes))
        if "RANK" in os.environ:
            torch.distributed.init_process_group(**settings)
        else:  # one process: an in-process store needs no port
            torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1, **settings)
    world = torch.distributed.get_world_size()
    model_parallel = parallel.model_parallel_size
    if world % model_parallel:
        raise ConfigError(
            f"{world} ranks do not divide into groups of tensor {parallel.tensor_model_parallel_size} x pipeline "
            f"{parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size} = {model_parallel}; "
            f"start a multiple of {model_parallel} ranks"
        )
    parallel.check_experts(world)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.virtual_pipeline_model_parallel_size if parallel.virtual_pipeline_model_parallel_size > 1 else None,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=1,  # an expert is whole on its rank
            distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    _log_once(f"device {here}, {world} ranks, backend {torch.distributed.get_backend()}")
    return here


def _keep_gloo_local() -> None:
    """Bind gloo's ports, which are not authenticated, to the loopback interface where all ranks are on this machine."""
    if "RANK" not in os.environ or os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def unseen_gpus() -> str:
    """Say that the machine has NVIDIA GPUs of which PyTorch sees none, and why; empty where it has none, or that is meant."""
    there, named = len(list(DEVICES.glob("nvidia[0-9]*"))), os.environ.get("CUDA_VISIBLE_DEVICES")
    if not there or torch.cuda.device_count() or named in ("", "-1"):
        return ""
    if torch.version.cuda is None:
        cause = f"torch {torch.__version__} is built without CUDA"
    elif named is not None:
        cause = f"CUDA_VISIBLE_DEVICES is {named}"
    else:
        cause = f"the driver may be too old for CUDA {torch.version.cuda}, see nvidia-smi"
    return (
        f"running on the CPU, as PyTorch sees none of this machine's NVIDIA GPUs ({there}; {cause}); where the CPU is meant, "
        f"set CUDA_VISIBLE_DEVICES to nothing"
    )


@functools.cache
def _warn_once(message: str) -> None:
    if is_main():
        logger.warning(message)


@functools.cache
def _log_once(message: str) -> None:
    if is_main():
        logger.info(message)


def is_timeout(error: BaseException) -> bool:
    """Whether an error is the timeout of a gloo collective; after its own, NCCL ends the process itself and logs why."""
    return isinstance(error, RuntimeError) and "timed out" in str(error).lower()


def shutdown() -> None:
    """Destroy all process groups after a barrier: NCCL may hang when it destroys one that is still in use."""
    from megatron.core import parallel_state

    if torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if torch.distributed.get_world_size() > 1:
            torch.distributed.barrier()
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def session(parallel: ParallelConfig | None = None, seed: int = 1234) -> Iterator[torch.device]:
    """Context that calls `initialize` on entry, and `shutdown` on exit if it started the process groups itself.

    After an error, a rank of several does not call `shutdown`, whose barrier could hang: it exits, and torchrun ends
    the others.
    """
    owner = not torch.distributed.is_initialized()
    try:
        yield initialize(parallel, seed)
    except BaseException:
        if owner and torch.distributed.is_initialized() and torch.distributed.get_world_size() == 1:
            shutdown()
        raise
    if owner:
        shutdown()
