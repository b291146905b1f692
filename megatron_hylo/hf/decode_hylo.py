"""The decode step with fixed shapes, captured as a CUDA graph: one token a sequence, on a cache of fixed size.

Eagerly a step of a 3B model launches a thousand small kernels, and launching takes longer than running them. In a graph all
launches are one. What changes from step to step lies on the device: the tokens, the number of cached ones, the last positions.
On a CPU the same pass runs eagerly.
"""

import contextlib
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.utils import logging

from megatron_hylo.kernels.elementwise import compile_on_request

from .cache_hylo import HyloCache
from .fused_hylo import join, linear, put_side_by_side
from .inputs_hylo import SequenceInputs, check_cache

if TYPE_CHECKING:
    from .modeling_hylo import HyloForCausalLM

logger = logging.get_logger(__name__)
COMPILED_STEPS = 4096
EXPANDED_ROWS = (
    32768  # of a cache whose keys are made anew in each step (MLA behind a q/k-norm): a graph makes those of all rows
)


class DecodeGraph:
    """One-token passes of a model on one cache; the first runs eagerly, the second is captured, later ones are replayed.

    Args:
        model: in eval mode, all on one device.
        cache: of fixed size, holding a prompt; its tensors are used in place.
        compiles: whether elementwise functions are compiled, which takes up to a minute the first time and makes a step about
            twice as fast; by default where the cache has room for `COMPILED_STEPS` tokens.
    """

    def __init__(self, model: "HyloForCausalLM", cache: HyloCache, compiles: bool | None = None) -> None:
        assert cache.last_position is not None, "the cache holds a prompt"
        self.model, self.cache = model, cache
        room = (cache.max_cache_len or 0) - cache.length
        self.compiles = room >= COMPILED_STEPS if compiles is None else compiles
        self.ids = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=cache.last_position.device)
        self.row = torch.zeros(1, dtype=torch.int64, device=self.ids.device)  # where the token goes: the number of cached ones
        self.last = cache.last_position.clone()
        self.real: Tensor | None = None  # bool [batch, rows], where a prompt has padding
        self.logits: Tensor | None = None  # [batch, 1, vocabulary]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.failure = ""  # why the pass could not be captured
        self.passes = 0
        self.expected = -1  # the cache's length after the last pass; another one: the cache was changed elsewhere
        self.capture_seconds = 0.0
        if self.ids.is_cuda:
            join_projections(model)

    def fits(self, cache: HyloCache) -> bool:
        """Whether the tensors are still of the right shapes for the cache."""
        last, padded = cache.last_position, cache.padding is not None
        same = last is not None and last.shape == self.last.shape and cache.batch_size == len(self.ids)
        mode = self.ids.is_inference() == torch.is_inference_mode_enabled()
        return same and mode and (not self.passes or padded == (self.real is not None))

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Read one token a sequence: int64 [batch, 1] -> logits [batch, 1, vocabulary], overwritten by the next call."""
        cache = self.cache
        cache.check_room(len(ids), 1)
        if cache.length != self.expected or cache.last_position is not self.last:
            self._follow()
        logits = self._replay(ids)
        cache.length += 1
        cache.last_position, self.expected = self.last, cache.length
        return logits

    def _replay(self, ids: Tensor) -> Tensor:
        """Run the pass on the tensors of the device as they are, by the graph where there is one."""
        self.ids.copy_(ids)
        if self.graph is not None:
            self.graph.replay()
        elif self.ids.is_cuda and self.passes and not self.failure:  # kernels are compiled by now
            self._capture()
        else:
            self._run()
        self.passes += 1
        assert self.logits is not None
        return self.logits

    def _follow(self) -> None:
        """Take over the cache's length, positions and padding."""
        cache = self.cache
        self.row.fill_(cache.length)
        if cache.last_position is not None and cache.last_position is not self.last:
            self.last.copy_(cache.last_position)
        padding = cache.known_padding()
        if padding is not None:
            if self.real is None:
                assert cache.max_cache_len is not None
                self.real = padding.new_ones(len(padding), cache.max_cache_len)
            self.real[:, : cache.length] = padding
            self.real[:, cache.length :] = True

    def _run(self) -> None:
        """Run the pass; nothing in it may wait for the device, copy from the host or change a shape."""
        cache, model = self.cache, self.model.model
        positions = self.last + 1
        if model.rotates_anew & set(model.mixers):
            assert cache.max_cache_len is not None
            places = torch.arange(cache.max_cache_len, device=self.ids.device)[None]
            # counted back from the last token; rows after it and padding are seen by no one
            ahead = (
                places - self.row
                if self.real is None
                else self.real.cumsum(1) - self.real.cumsum(1).gather(1, self.row.expand(len(self.real), 1))
            )
            positions = torch.cat([positions + ahead, positions], dim=1)  # those of all rows, then the token's own
        self._read(SequenceInputs(positions, None, self.real, length=(self.row + 1).int()), self.row)
        self.last += 1
        self.row += 1

    def _read(self, inputs: SequenceInputs, row: Tensor) -> None:
        """Read the tokens, whose rows go to `row`, and write the logits into their place."""
        model = self.model.model
        self.cache.row = row
        try:
            with compile_on_request() if self.compiles else contextlib.nullcontext():
                hidden = model.read(model.embed_tokens(self.ids), inputs, self.cache)
        finally:
            self.cache.row = None
        logits = linear(self.model.lm_head, hidden)
        if self.logits is None:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)

    def _capture(self) -> None:
        """Capture the pass, which runs nothing, and replay it; where that fails, run by single kernels from here on."""
        start = time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._run()
        except torch.OutOfMemoryError:  # whoever chose the batch may try a smaller one
            raise
        except RuntimeError as error:
            self.failure = str(error).partition("\n")[0]
            logger.warning("the decode step could not be captured as a CUDA graph, it runs by single kernels: %s", self.failure)
            self._run()
            return
        self.graph = graph
        self.capture_seconds = time.perf_counter() - start
        graph.replay()


def join_projections(model: "HyloForCausalLM") -> None:
    """Put the weights of maps of the same input behind each other in memory, so that each step multiplies with them at once."""
    for layer in model.model.layers:
        mixer = getattr(layer, layer.mixer_name)
        together = [[layer.mlp.gate_proj, layer.mlp.up_proj]]
        if hasattr(mixer, "projections"):
            together.append([module for group in mixer.projections() for module in group])
            put_side_by_side([mixer.q_conv1d.weight, mixer.k_conv1d.weight, mixer.v_conv1d.weight])
        if hasattr(mixer, "k_proj") and hasattr(mixer, "head_dim"):
            together.append([mixer.q_proj, mixer.k_proj, mixer.v_proj])
        if hasattr(mixer, "q_a_proj"):
            together.append([mixer.q_a_proj, mixer.kv_a_proj_with_mqa])
        for modules in together:
            join(modules)


def unsupported(model: "HyloForCausalLM", cache: HyloCache) -> str | None:
    """Say why decoding with this cache cannot be captured; None if it can."""
    if cache.max_cache_len is None:
        return "the cache grows"
    if "E" in model.config.mlps:
        return "experts are chosen by what the tokens are"
    if cache.records_past:
        return "the cache keeps what it needs to go back"
    if cache.positions is not None:
        return "positions are not counted ones"
    if model.model.rotates_anew & set(model.model.mixers) and cache.max_cache_len > EXPANDED_ROWS:
        return f"q/k-norm has all keys made anew in each step, of more than {EXPANDED_ROWS:,} rows"
    if len({p.device for p in model.parameters()}) > 1 or hasattr(model, "hf_device_map"):
        return "the model is on several devices"
    return None


def decode_graph(
    model: "HyloForCausalLM", ids: Tensor, mask: Tensor | None, positions: Tensor | None, cache: HyloCache | None
) -> DecodeGraph | None:
    """Return the graph that can read these tokens: one a sequence, after a prompt, on a GPU with a cache of fixed size."""
    if not isinstance(cache, HyloCache) or cache.max_cache_len is None or not cache.length or ids.shape[1] != 1:
        return None
    settled = not model.training and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    check_cache(cache, model.config)
    if not settled or not (ids.is_cuda or model.decodes_with_fixed_shapes) or unsupported(model, cache) is not None:
        return None
    if model.config.output_attentions or model.config.output_hidden_states or (mask is not None and mask.dim() != 2):
        return None
    if mask is not None and (mask.shape[1] != cache.length + 1 or not mask[:, -1].all()):  # padding within an answer
        return None
    last = cache.last_position
    if positions is not None and (last is None or torch.ne(positions, last + 1).any()):
        return None
    if next(iter(cache.rows.values()), (ids,))[0].is_inference() != torch.is_inference_mode_enabled():
        return None
    if cache.graph is None or cache.graph.model is not model or not cache.graph.fits(cache):
        cache.graph = DecodeGraph(model, cache)
    return cache.graph
