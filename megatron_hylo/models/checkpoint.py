"""Model folders: the one format that conversion, upcycling, training and export share.

DIR/hylo.json     {"format", "version", "model": ModelConfig, "params_dtype", "provenance"}
DIR/weights/      Megatron-Core dist_checkpointing (any parallelism can load it)
DIR/tokenizer/    the tokenizer's files, when there is one
DIR/manifest.json sizes and sha256 of all files; a folder without it is not finished
"""

import contextlib
import queue
import shutil
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader

from megatron_hylo.config import ConfigError, Fp8, ModelConfig, ParallelConfig
from megatron_hylo.io import (
    DamagedError,
    atomic_directory,
    barrier,
    hash_for_manifest,
    verify_manifest,
    write_json,
)
from megatron_hylo.models.description import FORMAT, VERSION, read_description
from megatron_hylo.models.hylo_model import HyloModel, build_chunks
from megatron_hylo.models.specs import BackendName
from megatron_hylo.platform.distributed import is_main
from megatron_hylo.platform.safe_loading import ADVICE, install_safe_loading, unpickling_reason

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def sharding_metadata() -> dict[str, Any]:
    """Metadata for Megatron-Core's sharded_state_dict functions: process group and optimizer format."""
    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,  # states of experts have the same keys whether they are a part of their own or not
    }


def sharded_weights(model: HyloModel) -> dict[str, Any]:
    """Sharded state dict of the weights alone; Transformer Engine's extra states are left out, so backends agree."""
    state = model.sharded_state_dict(metadata=sharding_metadata())
    return {key: value for key, value in state.items() if not key.endswith("_extra_state")}


def sharded_chunks(chunks: Sequence[HyloModel]) -> dict[str, dict[str, Any]]:
    """Sharded weights of a rank's chunks: {"model", "model1", ...}; tensor keys do not depend on the parallelism."""
    return {f"model{index or ''}": sharded_weights(chunk) for index, chunk in enumerate(chunks)}


def describe(config: ModelConfig, params_dtype: torch.dtype, provenance: dict[str, Any]) -> dict[str, Any]:
    """Content of hylo.json."""
    name = next(k for k, v in DTYPES.items() if v == params_dtype)
    return {"format": FORMAT, "version": VERSION, "model": config.to_dict(), "params_dtype": name, "provenance": provenance}


class BackgroundWrite:
    """Asynchronous save of a sharded state dict, with its present values, by a background thread; collective.

    Megatron-Core's own asynchronous saving forks or starts processes. Here its writing function runs in a thread, which
    the disk keeps waiting most of the time: nothing to fork beside NCCL and CUDA, nothing that outlives a killed rank.

    Args:
        state: sharded state dict.
        folder: where the files go; created, inside the atomic directory `sealed`.
        sealed: the atomic directory whose manifest gets the hashes of this rank's files.
        unchanged: nothing changes the tensors until `finish`, so on a CPU they need not be copied.
    """

    def __init__(self, state: dict[str, Any], folder: Path, sealed: Path, unchanged: bool = False) -> None:
        # Megatron-Core's own queue is served by a process that imports the main script again, seconds a run, and outlives
        # a rank that is killed, with the rank's output open.
        filesystem_async._results_queue = queue.Queue()
        if is_main():
            folder.mkdir(parents=True, exist_ok=True)
        barrier()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _own_storages(state)
            request = dist_checkpointing.save(state, str(folder), async_sharded_save=True, async_strategy="mcore")
        self.finalize, self.thread = request.finalize_fns, None
        if request.async_fn is not None:
            rank, planned, results = request.async_fn_args
            buckets = request.preload_fn()
            if not torch.cuda.is_available() and not unchanged:  # else the buckets hold the training's own tensors
                for (*_, (_, tensors)), (*_, (_, former)) in zip(buckets, planned):
                    former.clear()
                    tensors[:] = [(item, tensor.clone()) for item, tensor in tensors]
            files = [Path(file) for file, *_ in buckets]

            def write() -> None:
                """Write this rank's buckets and hash the files for the manifest; what fails is told by `finish`."""
                request.async_fn(rank, buckets, results)
                with contextlib.suppress(OSError):  # of a full disk; `finish` says so
                    hash_for_manifest(sealed, files)

            self.thread = threading.Thread(target=write, name="checkpoint", daemon=True)
            self.thread.start()

    def done(self) -> bool:
        """Whether this rank has written its part."""
        return self.thread is None or not self.thread.is_alive()

    def finish(self) -> None:
        """Wait for all ranks and complete the folder."""
        if self.thread is not None:
            self.thread.join()
        barrier()
        for finalize in self.finalize:
            finalize()


def _own_storages(state: dict[str, Any]) -> None:
    """Give parts of buffers on a CPU storages of just their size, in the same memory: Megatron-Core copies all others."""
    apply_factories(state)
    for value in nested_values(state):
        if isinstance(value, ShardedTensor) and value.data is not None and value.data.device.type == "cpu":
            if value.data.is_contiguous():
                value.data = torch.from_dlpack(value.data.detach())


def load_weights(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read what a sharded state dict asks for out of `folder`, which may come from anybody: nothing in it is run.

    Args:
        state: Megatron-Core's sharded state dict, names -> `ShardedTensor` or factories.
        folder: weights/ of a model folder or checkpoint.

    Returns:
        The state dict with the tensors of this rank.

    Raises:
        ConfigError: the folder holds what could run code, or what this project does not write.
        DamagedError: it cannot be read.
    """
    install_safe_loading()
    if (folder / "common.pt").exists():
        raise ConfigError(f"{folder} is refused: it holds common.pt, a pickle of older Megatron-Core; {ADVICE}")
    try:
        FileSystemReader(folder).read_metadata()  # else torch looks on for a file of this rank, and says nothing of this one
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return dist_checkpointing.load(state, str(folder))
    except (CheckpointException, OSError) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if isinstance(cause, ConfigError):
            raise cause from error
        raise DamagedError(f"{folder} cannot be read: {unpickling_reason(cause)}; {ADVICE}") from error


def put_weights(model: nn.Module, state: dict[str, Any]) -> None:
    """Load a plain state dict; only Transformer Engine's extra states may be missing.

    Raises:
        ConfigError: any other tensor is missing or unknown.
    """
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    if missing or unexpected:
        raise ConfigError(f"weights do not fit the model: missing {missing[:3]}, unknown {unexpected[:3]}")


def put_chunks(chunks: Sequence[HyloModel], state: dict[str, Any]) -> None:
    """Load what `sharded_chunks` names."""
    for index, chunk in enumerate(chunks):
        put_weights(chunk, state[f"model{index or ''}"])


def save_model(
    model: HyloModel | Sequence[HyloModel],
    path: str | Path,
    tokenizer: str | Path | None = None,
    provenance: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model folder; all ranks call it.

    Args:
        model: this rank's part, or its chunks.
        path: folder to make.
        tokenizer: folder whose files are copied to DIR/tokenizer.
        provenance: where the weights come from, kept in hylo.json.
        overwrite: replace what is there.
    """
    chunks = [model] if isinstance(model, HyloModel) else model
    config = chunks[0].config
    with atomic_directory(path, overwrite) as folder:
        BackgroundWrite(sharded_chunks(chunks), folder / "weights", folder).finish()
        if is_main():
            write_json(folder / "hylo.json", describe(config.hylo, config.params_dtype, provenance or {}))
            if tokenizer is not None:
                shutil.copytree(tokenizer, folder / "tokenizer")


def load_model(path: str | Path, parallel: ParallelConfig | None = None, **settings: Any) -> HyloModel:
    """Load a model that has one chunk on each rank (no virtual pipeline stages); arguments as of `load_chunks`."""
    (model,) = load_chunks(path, parallel, **settings)
    return model


def load_chunks(
    path: str | Path,
    parallel: ParallelConfig | None = None,
    params_dtype: torch.dtype | None = None,
    backend: BackendName = "auto",
    recompute: bool | str = False,
    fp8: Fp8 | None = None,
    verify_hashes: bool = True,
    **changes: Any,
) -> list[HyloModel]:
    """Build this rank's part of a saved model, a chunk a virtual pipeline stage, and fill it.

    Args:
        path: a model folder or a training checkpoint.
        parallel: sizes of the parallel groups, which may differ from those that wrote the folder.
        params_dtype: by default the folder's own.
        backend, recompute, fp8: as in `build_model`.
        verify_hashes: compare all files with the manifest first.
        changes: fields of the configuration to replace (a longer context's rope scaling, say).

    Raises:
        ConfigError: not a model folder; what `build_model` refuses.
        DamagedError: its files are not what its manifest says.
    """
    config, description = read_description(path)
    verify_manifest(path, hashes=verify_hashes)
    dtype = params_dtype or DTYPES[description["params_dtype"]]
    chunks = build_chunks(config.replace(**changes), parallel, dtype, backend, recompute, fp8, initialize=False)
    put_chunks(chunks, load_weights(sharded_chunks(chunks), Path(path) / "weights"))
    return chunks
