"""Backends of the layers that compute by themselves: what their pages hold, and where the tokens of a step's requests are."""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor, split_decodes_and_prefills

from megatron_hylo.serve.vllm.latent_kernels import Prefill

CACHED_TOKENS = 131_072  # of several requests, whose keys and values are made anew at once while prompts are read


class Builder(AttentionMetadataBuilder[Any]):
    """Makes metadata once a step, from what vLLM gives it: the description of the pages, the layers' names, the settings."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)


@dataclass
class LatentMetadata:
    """Requests of one step: first those with one token each, then the others."""

    slots: Tensor  # int64 [tokens], page * tokens a page + place, -1 for padding; vLLM's own tensor, which CUDA graphs read
    decodes: int
    block_table: Tensor  # int32 [decodes, pages]
    lengths: Tensor  # int32 [decodes], with the new token
    prefills: list[Prefill]


class LatentBuilder(Builder):
    """Makes LatentMetadata once a step; for decodes alone it holds vLLM's own tensors, so the step can be captured."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold: int = 1

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> LatentMetadata:
        """Divide the requests, and find the pages of all tokens that prefills see."""
        m, decodes = common_attn_metadata, split_decodes_and_prefills(common_attn_metadata, decode_threshold=1)[0]
        starts, slots = m.query_start_loc_cpu.tolist(), m.slot_mapping[: m.num_actual_tokens]
        lengths = m.seq_lens_cpu_upper_bound[: m.num_reqs].tolist()  # exact of prefills; the GPU's are made by the step before
        at_once = max(1, m.num_reqs - decodes) if sum(lengths[decodes:]) <= CACHED_TOKENS else 1
        parts = pairwise(range(decodes, m.num_reqs + 1, at_once))
        prefills = [self._prefill(starts[i : j + 1], lengths[i:j], m.block_table_tensor[i:j]) for i, j in parts]
        return LatentMetadata(slots, decodes, m.block_table_tensor[:decodes], m.seq_lens[:decodes], prefills)

    def _prefill(self, starts: list[int], keys: list[int], block_table: Tensor) -> Prefill:
        size, device = self.kv_cache_spec.block_size, block_table.device
        queries = [end - begin for begin, end in zip(starts, starts[1:])]
        positions = async_tensor_h2d(torch.cat([torch.arange(length) for length in keys]), device)
        requests = async_tensor_h2d(torch.repeat_interleave(torch.arange(len(keys)), torch.tensor(keys)), device)
        blocks = block_table[requests, positions // size].long()
        sums = [async_tensor_h2d([0, *accumulate(counts)], device, torch.int32) for counts in (queries, keys)]
        return Prefill(slice(starts[0], starts[-1]), queries, keys, sums[0], sums[1], blocks, positions % size)


class LatentBackend(AttentionBackend):
    """Pages of one head whose K and V side by side are a token's row of latents, so half of it is the head's size."""

    get_name = staticmethod(lambda: "CUSTOM")  # a name outside vLLM's own
    get_builder_cls = staticmethod(lambda: LatentBuilder)
    indexes_kv_by_block_stride = classmethod(lambda cls: True)  # pages may be padded; asked by vLLM before 0.30

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """[blocks, 1, tokens a block, row]; blocks may be padded."""
        return num_blocks, num_kv_heads, block_size, 2 * head_size


@dataclass
class StateMetadata:
    """Places of each request's tokens and of its state."""

    starts: list[int]  # of each request's tokens in the batch, and the end
    slots: list[int]  # block of each request's states
    continued: list[bool]  # whether its state holds earlier tokens


class StateBuilder(Builder):
    """Makes StateMetadata once a step."""

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> StateMetadata:
        """Read the blocks of states for the cache mode that is set."""
        m, mode = common_attn_metadata, self.vllm_config.cache_config.mamba_cache_mode
        table = mamba_get_block_table_tensor(m.block_table_tensor, m.seq_lens, self.kv_cache_spec, mode)
        starts = m.query_start_loc_cpu.tolist()
        continued = [length > end - begin for length, begin, end in zip(m.seq_lens.tolist(), starts, starts[1:])]
        return StateMetadata(starts, table[:, 0].tolist(), continued)


class StateBackend(AttentionBackend):
    """Backend of linear layers, as far as vLLM asks."""

    get_name = staticmethod(lambda: "CUSTOM")
    get_builder_cls = staticmethod(lambda: StateBuilder)
    is_ssm = classmethod(lambda cls: True)  # pages hold states of fixed size
