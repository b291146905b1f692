"""`hylo calibrate`: one pass of the teacher over some text, layer by layer, all tokens through one layer at a time.

So one layer's weights and statistics exist at a time, and what is held of the text is its hidden states: on the GPU where
there is room, else in the CPU's memory. Ranks share the work: data-parallel ranks the windows, tensor-parallel ranks the heads
and the rows of the input moment. Each finished layer is written; started again, the pass runs through the layers that are
there without measuring.
"""

import hashlib
import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megatron_hylo.calibrate.description import FORMAT, VERSION
from megatron_hylo.calibrate.statistics import (
    LOOK_BACK_TOKENS,
    RECEPTION_TOKENS,
    check_statistics,
    layer_file,
    save_whole,
)
from megatron_hylo.config import ConfigError, ParallelConfig
from megatron_hylo.data.heldout import heldout_windows
from megatron_hylo.data.packed import PackedDataset
from megatron_hylo.data.tokenizer import check_dataset, check_ids, copy_tokenizer
from megatron_hylo.distill.alignment import mlp_layer
from megatron_hylo.io import atomic_directory, check_free, on_main, staging_directory, write_json
from megatron_hylo.io.identity import content_identity
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.models.checks import require_finite, warn_beyond_context
from megatron_hylo.models.description import read_description
from megatron_hylo.models.streamed import ModelParts, open_parts
from megatron_hylo.platform.distributed import device, is_main

KEPT_ON_GPU = 1 / 3  # of its free memory; hidden states that need more are offloaded


def calibrate(
    teacher: str | Path,
    data: str | Path,
    output: str | Path,
    tokens: int = 65_536,
    sequence_length: int = 2048,
    heldout: int = 16,
    seed: int = 1234,
    precision: torch.dtype = torch.float32,
    parallel: ParallelConfig | None = None,
    overwrite: bool = False,
    track: Track = no_progress,
) -> None:
    """Write a calibration folder; `platform.initialize` must have run, with `parallel`.

    Args:
        teacher: model folder, attention in every layer.
        data: dataset folder made by `hylo preprocess`; `train` is measured, windows of `heldout` are kept for evaluation.
        output: folder to make. Layers done so far are kept beside it and reused when the same command runs again.
        tokens: of calibration text, rounded up to whole windows.
        sequence_length: tokens a window.
        heldout: windows at most that later evaluations use.
        seed: of the choice of windows.
        precision: of the teacher's forward pass; moments are float64 sums whatever it is.
        parallel: tensor and data parallelism; no pipeline stages.
        overwrite: replace what is there.
        track: progress display over an iterable.

    Raises:
        ConfigError: a layer that cannot be calibrated (see `check_statistics`), or a setting that cannot work.
    """
    check_free(output, overwrite, [teacher, data])
    if tokens < 1 or sequence_length < 1:
        raise ConfigError(f"--tokens and --sequence_length must be at least 1, got {tokens} and {sequence_length}")
    config, _ = read_description(teacher)
    if not config.is_transformer:
        raise ConfigError(f"calibrate needs a teacher with attention (`*`, `W`) in every layer, {teacher} has {config.mixers}")
    if parallel is not None:
        parallel.check_tensor_parallel_alone("calibrate")
    windows = _calibration_windows(data, tokens, sequence_length, seed)
    warn_beyond_context(config, sequence_length, teacher)
    kept = heldout_windows(f"{data}/heldout", sequence_length, heldout)
    for ids in (windows, kept):
        check_ids(ids, config.vocab_size, data, teacher)
    check_dataset(data, teacher)
    description = {
        "format": FORMAT, "version": VERSION, "teacher": content_identity(teacher), "tokens": windows[:, 1:].numel(),
        "sequence_length": sequence_length, "layers": config.num_hidden_layers,
        "windows": hashlib.sha256(windows.numpy().tobytes()).hexdigest(), "precision": str(precision).split(".")[1],
    }  # fmt: skip
    parts = open_parts(teacher, parallel, precision)  # refuses ranks that do not divide heads, before anything is written
    work = staging_directory(Path(output), "layers", "calibration", description)
    _gather_layers(parts, teacher, windows[:, :-1], work, track)
    with atomic_directory(output, overwrite) as folder:
        if is_main():
            save_file({"calibration": windows.int(), "heldout": kept.int()}, folder / "windows.safetensors")
            write_json(folder / "calibration.json", description)
            copy_tokenizer(data, folder)
            for layer in range(config.num_hidden_layers):
                shutil.copy(work / layer_file(layer), folder)
    if is_main():
        shutil.rmtree(work)


@torch.no_grad()
def embed(parts: ModelParts, micro_batches: Sequence[Tensor], states: float = 1.0) -> list[Tensor]:
    """Embed micro-batches int64 [n, sequence]: a [sequence, n, hidden] tensor each, where hidden states are kept.

    Args:
        parts: the model.
        micro_batches: of this rank.
        states: tensors as large as all hidden states that will be kept there together.
    """
    config = parts.config
    values = sum(ids.numel() for ids in micro_batches) * config.hidden_size
    place = place_of_states(int(states * values * config.params_dtype.itemsize))
    with parts.loaded("embedding"):
        return [parts.model.embedding(input_ids=ids.to(device()), position_ids=None).to(place) for ids in micro_batches]


def place_of_states(size: int) -> torch.device:
    """Choose the device where so many bytes wait: the GPU if they take at most KEPT_ON_GPU of its free memory, else the CPU."""
    here = device()
    if here.type == "cuda" and size > KEPT_ON_GPU * torch.cuda.mem_get_info(here)[0]:
        return torch.device("cpu")
    return here


def micro_batch(sequence_length: int, tokens: int = 8192) -> int:
    """Number of windows that pass through a layer together."""
    return max(1, tokens // sequence_length)


def _calibration_windows(data: str | Path, tokens: int, sequence_length: int, seed: int) -> Tensor:
    dataset = PackedDataset(f"{data}/train", sequence_length, seed)
    wanted = math.ceil(tokens / sequence_length)
    if wanted > dataset.windows_per_epoch:
        raise ConfigError(
            f"{data} has {dataset.windows_per_epoch} windows of {sequence_length} tokens, {tokens} calibration tokens need "
            f"{wanted}; give more text or ask for at most {dataset.windows_per_epoch * sequence_length} tokens"
        )
    return torch.stack([dataset[i] for i in range(wanted)])


@torch.no_grad()
def _gather_layers(model: ModelParts, teacher: str | Path, windows: Tensor, work: Path, track: Track) -> None:
    """Run all windows through one layer at a time."""
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    own = windows[rank::ranks]
    states = embed(model, own.split(micro_batch(windows.shape[1])) if len(own) else ())
    layers = range(model.config.hylo.num_hidden_layers)
    done = on_main(lambda: [layer for layer in layers if (work / layer_file(layer)).is_file()])
    for layer in track(layers, "calibrate"):
        file = work / layer_file(layer)
        with model.layer(layer) as (mixer, mlp):
            for part in (mixer, mlp):
                require_finite(part, teacher)
            sums = None if layer in done else LayerSums(mixer.self_attention)
            for i, state in enumerate(track(states, f"layer {layer}")):
                hidden = state.to(device())
                x = mixer.input_layernorm(hidden)[0]
                query, key, value = mixer.self_attention.query_key_value(x)
                out = mixer.self_attention.attend(query, key, value)[0]
                if sums is not None:
                    sums.add(x, query, key, value, out)
                states[i] = mlp_layer(mlp, hidden + out).to(state.device)
        if sums is not None:
            statistics = sums.means(layer)
            check_statistics(statistics)
            on_main(partial(save_whole, statistics, file))
        else:
            check_statistics(load_file(file))


class LayerSums:
    """Sums over tokens of one attention layer, float64, this rank's part."""

    def __init__(self, attention: nn.Module) -> None:
        self.attention: Any = attention  # a SelfAttention of models/, whose methods nn.Module does not declare
        self.sums: dict[str, Tensor] = {}

    def add(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
        """Add one micro-batch to the sums.

        Args:
            x, out: input and output of the mixer, [sequence, batch, hidden].
            query, key, value: as the layer's `query_key_value` returns them.
        """
        query = query.flatten(2, 3)
        flat = x.flatten(0, 1).double()
        tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
        q, k = (part.flatten(0, 1).transpose(0, 1).double() for part in (query, key))  # [heads, tokens, dh]
        new = {
            "tokens": torch.tensor(float(len(flat)), dtype=torch.float64, device=flat.device),
            "input_mean": flat.sum(0),
            "input_second_moment": flat.chunk(tp, dim=1)[rank].T @ flat,
            "query_second_moment": q.mT @ q,
            "key_second_moment": k.mT @ k,
            "output_energy": out.double().square().sum(),
        }
        new |= self._look_back(x.transpose(0, 1), query, key, value)
        for name, tensor in new.items():
            self.sums[name] = self.sums[name] + tensor if name in self.sums else tensor

    def _look_back(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Tensor]:
        """Compute the sums that need attention probabilities; arguments [batch, sequence, ...]."""
        query, key, value = (part.float() for part in (self.attention.rotate(query), self.attention.rotate(key), value))
        repeats, length, x = query.shape[2] // key.shape[2], query.shape[1], x.double()
        key, value = key.repeat_interleave(repeats, 2), value.repeat_interleave(repeats, 2)
        norms, received = [], torch.zeros_like(query[..., 0].transpose(1, 2))  # [batch, heads, keys]
        zeros = query.new_zeros(query.shape[2], dtype=torch.float64)
        sums = {name: zeros.clone() for name in ("sink_mass", "looked_back", "looked_mass", "entropy")}
        for start in range(0, length, LOOK_BACK_TOKENS):
            stop = min(start + LOOK_BACK_TOKENS, length)
            scores = torch.einsum("bthd,bshd->bhts", query[:, start:stop], key[:, :stop]) * query.shape[-1] ** -0.5
            back = torch.arange(start, stop, device=query.device)[:, None] - torch.arange(stop, device=query.device)
            unseen = (back < 0) | (back >= (self.attention.window or stop))
            probability = scores.masked_fill(unseen, -torch.inf).softmax(-1)  # [batch, heads, queries, keys]
            norms.append(torch.einsum("bhts,bshd->bthd", probability, value[:, :stop]).norm(dim=-1).double())
            near = probability * ((back >= 0) & (back < RECEPTION_TOKENS))
            received[..., :stop] += (near / near.sum(-1, keepdim=True)).sum(2)
            sums["sink_mass"] += probability[..., 0].sum((0, 2)).double()
            sums["entropy"] += torch.special.entr(probability).sum((0, 2, 3)).double()
            sums["looked_back"] += (probability * back.clamp(min=0))[..., 1:].sum((0, 2, 3)).double()
            sums["looked_mass"] += probability[..., 1:].sum((0, 2, 3)).double()
        norm, received = torch.cat(norms, 1), received.clamp(1e-2, 20).log().transpose(1, 2).double()
        return sums | {
            "head_energy": norm.square().sum((0, 1)),
            "head_length": norm.sum((0, 1)),
            "length_moment": torch.einsum("bth,btd->hd", norm, x),
            "reception": received.sum((0, 1)),
            "reception_moment": torch.einsum("bth,btd->hd", received, x),
        }

    def means(self, layer: int) -> dict[str, Tensor]:
        """Return means over all ranks' tokens, all heads; the data- and tensor-parallel ranks of a layer call it together.

        Returns:
            The tensors that `megatron_hylo.calibrate.statistics` lists, with their shapes: float32, and int64 for layer and
            tokens. On the CPU.
        """
        group = parallel_state.get_data_parallel_group()
        shapes = [{name: tensor.shape for name, tensor in self.sums.items()}]
        torch.distributed.broadcast_object_list(shapes, torch.distributed.get_global_rank(group, 0), group)
        for name, shape in shapes[0].items():
            if name not in self.sums:  # this rank had no windows; the first one has
                self.sums[name] = torch.zeros(shape, dtype=torch.float64, device=device())
            torch.distributed.all_reduce(self.sums[name], group=group)
        tokens = self.sums["tokens"]
        mean = {name: tensor / tokens for name, tensor in self.sums.items()}
        split = ("input_second_moment", "query_second_moment", "key_second_moment", "sink_mass", "head_energy")
        by_rank = {name: mean[name] for name in split}  # this tensor-parallel rank's rows, or heads
        by_rank["attention_entropy"] = mean["entropy"]
        by_rank["attention_distance"] = self.sums["looked_back"] / self.sums["looked_mass"]
        by_rank["length_moment"] = mean["length_moment"] / mean["head_length"][:, None]
        by_rank["reception_moment"] = mean["reception_moment"] - torch.outer(mean["reception"], mean["input_mean"])
        whole = {name: mean[name] for name in ("input_mean", "output_energy")}
        whole |= {name: _gather_first(tensor) for name, tensor in by_rank.items()}
        numbers = {"layer": torch.tensor(layer), "tokens": tokens.long().cpu()}
        return numbers | {name: tensor.float().cpu().contiguous() for name, tensor in whole.items()}


def _gather_first(tensor: Tensor) -> Tensor:
    """Concatenate along dimension 0 over the tensor-parallel ranks."""
    return gather_from_tensor_model_parallel_region(tensor.movedim(0, -1).contiguous()).movedim(-1, 0)
