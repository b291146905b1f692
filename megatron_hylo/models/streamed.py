"""Models larger than memory: each part has its weights only while they are needed."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_hylo.config import ParallelConfig
from megatron_hylo.io import verify_manifest
from megatron_hylo.models.checkpoint import DTYPES
from megatron_hylo.models.description import read_description
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.models.recompute import FeedForwardLayer, MixerLayer
from megatron_hylo.models.weights_files import StoredLayout, WeightsReader, skeleton
from megatron_hylo.platform.distributed import device


class ModelParts:
    """A model whose parts are loaded for a while, or one that is in memory as a whole.

    Args:
        model: this rank's part, without pipeline stages; in memory, or made by `skeleton`.
        read: name of a parameter -> its value, for a model without memory.
    """

    def __init__(self, model: HyloModel, read: Callable[[str], Tensor] | None = None) -> None:
        self.model, self.read, self.config = model, read, model.config

    @contextlib.contextmanager
    def loaded(self, *parts: str) -> Iterator[None]:
        """Context in which parts have their weights, on this rank's device.

        Args:
            parts: names of submodules: a layer, "embedding", "decoder.final_norm", "output_layer".
        """
        with contextlib.ExitStack() as held:
            for part in parts:
                if self.read is not None:
                    self._put(part)
                    held.callback(self._take, part)
            yield

    @contextlib.contextmanager
    def layer(self, number: int, mlp: bool = True) -> Iterator[tuple[MixerLayer, FeedForwardLayer]]:
        """Context with one Transformer layer loaded: its mixer and, unless it is not wanted, its MLP."""
        mixer, feed_forward = f"decoder.layers.{2 * number}", f"decoder.layers.{2 * number + 1}"
        with self.loaded(mixer, *([feed_forward] if mlp else [])):
            yield self.model.mixer_layers()[number]

    @contextlib.contextmanager
    def streaming(self, keep_ends: bool = True) -> Iterator[HyloModel]:
        """Context in which the model computes, with the weights of one mixer or MLP in memory at a time.

        Args:
            keep_ends: keep embedding, final norm and output head loaded for the whole context; else the first two are streamed
                as well, and the head is never loaded.
        """
        ends = ["embedding", "decoder.final_norm"]
        streamed = [f"decoder.layers.{i}" for i in range(len(self.model.decoder.layers))] + ([] if keep_ends else ends)
        head = [] if self.model.share_embeddings_and_output_weights else ["output_layer"]
        with contextlib.ExitStack() as held:
            held.enter_context(self.loaded(*ends, *head) if keep_ends else contextlib.nullcontext())
            for part in streamed if self.read is not None else ():
                module = self.model.get_submodule(part)
                put, take = partial(self._put, part), partial(self._take, part)
                held.callback(module.register_forward_pre_hook(lambda *_, put=put: put()).remove)
                held.callback(module.register_forward_hook(lambda *_, take=take: take(), always_call=True).remove)
            yield self.model

    def _put(self, part: str) -> None:
        assert self.read is not None
        module = self.model.get_submodule(part)
        for name, parameter in list(module.named_parameters()):
            owner, _, last = name.rpartition(".")
            value = self.read(f"{part}.{name}").to(device(), parameter.dtype)
            module.get_submodule(owner)._parameters[last] = nn.Parameter(value, requires_grad=False)
        module.eval()

    def _take(self, part: str) -> None:
        for owner in self.model.get_submodule(part).modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    owner._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def as_parts(model: HyloModel | ModelParts) -> ModelParts:
    """Return a model that is in memory as `ModelParts`; those unchanged."""
    return model if isinstance(model, ModelParts) else ModelParts(model)


def open_parts(path: str | Path, parallel: ParallelConfig | None = None, params_dtype: torch.dtype | None = None) -> ModelParts:
    """Open a model folder or training checkpoint whose parts are read when they are loaded.

    Args:
        path: the folder.
        parallel: sizes of the parallel groups; no pipeline stages. Each rank reads its own part.
        params_dtype: by default the folder's own.

    Raises:
        ConfigError: not a model folder; what `build_model` refuses.
        DamagedError: its files are not what its manifest says.
    """
    config, description = read_description(path)
    verify_manifest(path)
    model = skeleton(config, params_dtype or DTYPES[description["params_dtype"]], parallel)
    layout, reader = StoredLayout(model), WeightsReader(Path(path) / "weights")
    return ModelParts(model, lambda name: layout.merge(name, reader))
