"""Pages of latents for vLLM: what a page holds, and where the tokens of a step's requests are."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, MultipleOf
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from megatron_hylo.serve.vllm.backend import Backend, Builder

CACHED_TOKENS = 131_072  # whose keys and values are made anew at a time while prompts are read; one request may have more


@dataclass
class Prefill:
    """Some of the requests that read several tokens: queries that lie side by side, and all tokens that they see."""

    tokens: slice  # of the batch
    queries: list[int]  # tokens a request
    keys: list[int]  # tokens a request, cached ones included
    query_starts: Tensor  # int32 [requests + 1]
    key_starts: Tensor
    blocks: Tensor  # int64 [all keys], pages
    places: Tensor  # in them


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
        m = common_attn_metadata
        decodes = split_decodes_and_prefills(m, decode_threshold=1)[0]
        starts = m.query_start_loc_cpu.tolist()
        lengths = m.seq_lens[decodes:].tolist() if decodes < m.num_reqs else []
        prefills, first = [], decodes
        while first < m.num_reqs:
            last = first + 1
            while last < m.num_reqs and sum(lengths[first - decodes : last + 1 - decodes]) <= CACHED_TOKENS:
                last += 1
            keys = lengths[first - decodes : last - decodes]
            prefills.append(self._prefill(starts[first : last + 1], keys, m.block_table_tensor[first:last]))
            first = last
        slots = m.slot_mapping[: m.num_actual_tokens]
        return LatentMetadata(slots, decodes, m.block_table_tensor[:decodes], m.seq_lens[:decodes], prefills)

    def _prefill(self, starts: list[int], keys: list[int], block_table: Tensor) -> Prefill:
        size, device = self.kv_cache_spec.block_size, block_table.device
        queries = [end - begin for begin, end in zip(starts, starts[1:])]
        positions = torch.cat([torch.arange(length) for length in keys]).to(device)
        requests = torch.repeat_interleave(torch.arange(len(keys)), torch.tensor(keys)).to(device)
        blocks = block_table[requests, positions // size].long()
        sums = [torch.tensor([0, *accumulate(counts)], dtype=torch.int32).to(device) for counts in (queries, keys)]
        return Prefill(slice(starts[0], starts[-1]), queries, keys, sums[0], sums[1], blocks, positions % size)


class LatentBackend(Backend):
    """Pages of one head whose K and V side by side are a token's row of latents, so half of it is the head's size."""

    builder = LatentBuilder
    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_supported_kernel_block_sizes(*_: Any) -> list[int | MultipleOf]:
        """Any multiple of 16 tokens."""
        return [MultipleOf(16)]

    @classmethod
    def indexes_kv_by_block_stride(cls) -> bool:
        """Whether pages may be padded; asked by vLLM before 0.30."""
        return True

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """[blocks, 1, tokens a block, row]; blocks may be padded."""
        return num_blocks, num_kv_heads, block_size, 2 * head_size
