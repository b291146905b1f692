"""`G`: Gated DeltaNet with the paper's shapes (fla's layer: key width 0.75 d, values twice as wide, output gate).

S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - S_{t-1}^T k_t))^T,  o_t = S_t^T q_t / sqrt(d_k)      (HyLo, appendix A.3)
y = W_O (RMSNorm(o) * silu(W_G x)),  g = -exp(A_log) softplus(W_a x + dt_bias),  beta = sigmoid(W_b x)
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_hylo.kernels.causal_conv1d import causal_conv1d_sections
from megatron_hylo.kernels.elementwise import elementwise
from megatron_hylo.kernels.gated_delta_rule import gated_delta_rule
from megatron_hylo.kernels.sections import split_sections
from megatron_hylo.kernels.ssd import RESET
from megatron_hylo.models.layers import HeadNorm, sharded_mixer_state, tensor_parallel_parameter
from megatron_hylo.models.mixer import MixerSubmodules, fused_column_linear, refuse_inference, row_linear
from megatron_hylo.models.recompute import is_recomputed
from megatron_hylo.models.transformer_config import HyloTransformerConfig
from megatron_hylo.parallel.context import context_group
from megatron_hylo.parallel.documents import Packed, batch_first, sequence_first
from megatron_hylo.parallel.recurrence import delta_rule_over_ranks
from megatron_hylo.platform.distributed import device


class ShortConvolution(MegatronModule):
    """Depthwise causal convolution over `channels` of this rank, SiLU after it. Weight [channels, 1, kernel]."""

    def __init__(self, config: HyloTransformerConfig, channels: int, bias: bool) -> None:
        super().__init__(config=config)
        kernel, where = config.hylo.linear_conv_kernel_dim, device()
        bound = 1 / math.sqrt(kernel)  # nn.Conv1d's default for one input channel a group
        with get_cuda_rng_tracker().fork():
            weight = torch.empty(channels, 1, kernel, device=where).uniform_(-bound, bound)
            offset = torch.empty(channels, device=where).uniform_(-bound, bound)
        self.weight = tensor_parallel_parameter(weight, dtype=config.params_dtype)
        self.bias = tensor_parallel_parameter(offset, dtype=config.params_dtype) if bias else None

    def forward(
        self,
        sections: Sequence[Tensor],
        before: Tensor | None = None,
        positions: Tensor | None = None,
        own: Callable[[Tensor], Tensor] = lambda parameter: parameter,
    ) -> list[Tensor]:
        """[batch, sequence, width] of each section of the channels -> the same, in memory of its own each.

        Args:
            sections: the inputs, all channels together.
            before: the tokens before them, [batch, all channels, kernel - 1].
            positions: place of each token in its document, int64 [sequence]; no tap reaches before a document.
            own: weight or bias of all channels -> that of the sections' channels.
        """
        weight, bias = own(self.weight.squeeze(1)), own(self.bias) if self.bias is not None else None
        return causal_conv1d_sections(sections, weight, bias, "silu", before, positions)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Channels are split over the tensor-parallel ranks."""
        return sharded_mixer_state(self, prefix, sharded_offsets, metadata, self.tp_group, {})


def log_uniform_dt_bias(heads: int, where: torch.device) -> Tensor:
    """Inverse softplus of step sizes drawn log-uniformly from [1e-3, 1e-1], floor 1e-4: fp32 [heads] (Mamba2)."""
    dt = torch.exp(torch.rand(heads, device=where) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))


@elementwise
def gates_of(alpha: Tensor, beta: Tensor, decay_log: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(g fp32, beta) as the recurrence takes them: [batch, sequence, heads] from the projections and [heads]."""
    return -decay_log.exp() * F.softplus(alpha.float() + bias), beta.sigmoid()


class GatedDeltaNet(MegatronModule):
    """Linear attention with a delta-rule state of [key_head_dim, value_head_dim] a head."""

    def __init__(
        self,
        config: HyloTransformerConfig,
        submodules: MixerSubmodules,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        c = config.hylo
        self.tp_group = pg_collection.tp
        tp = self.tp_group.size()
        self.heads = c.linear_num_heads // tp
        self.context = context_group(config.cp_comm_type, pg_collection.cp, recurrent=True, linear_num_heads=self.heads)
        keys, values = self.heads * c.linear_key_head_dim, self.heads * c.linear_value_head_dim
        self.sections = {"query": keys, "key": keys, "value": values, "gate": values, "beta": self.heads, "alpha": self.heads}
        self.in_proj = fused_column_linear(submodules, config, c.hidden_size, tp * sum(self.sections.values()), self.tp_group)
        self.conv1d = ShortConvolution(config, 2 * keys + values, bias=False)
        self.conv1d.tp_group = self.tp_group
        with get_cuda_rng_tracker().fork():
            decay = torch.empty(self.heads, device=device()).uniform_(1e-4, 16).log()
            self.A_log = tensor_parallel_parameter(decay, keep_fp32=True)
            self.dt_bias = tensor_parallel_parameter(log_uniform_dt_bias(self.heads, device()), keep_fp32=True)
        self.out_norm = HeadNorm(config, c.linear_value_head_dim)
        self.out_proj = row_linear(submodules, config, tp * values, c.hidden_size, self.tp_group)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        packed_seq_params: Packed = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """hidden_states: [sequence (/ TP with sequence parallelism), batch, hidden] -> the same, and no bias."""
        refuse_inference(kwargs)
        c, context, documents = self.config.hylo, self.context, self.context.seen(packed_seq_params)
        projected, _ = self.in_proj(hidden_states)
        sections = dict(
            zip(self.sections, split_sections(batch_first(projected, packed_seq_params), [*self.sections.values()]))
        )
        gate = sections.pop("gate")
        *qkv, beta, alpha = context.exchange(*((x, [x.shape[-1]]) for x in sections.values()))
        own = functools.partial(context.own_share, widths=[self.sections[name] for name in ("query", "key", "value")])
        places = documents.own_positions if documents is not None else None
        qkv = self.conv1d(*context.tokens_before(qkv, c.linear_conv_kernel_dim - 1), places, own)
        query, key, value = (x.unflatten(-1, (beta.shape[-1], -1)) for x in qkv)
        decay, beta = gates_of(alpha, beta, context.own_share(self.A_log), context.own_share(self.dt_bias))
        if documents is not None:
            decay = decay.masked_fill(documents.begins[:, None], RESET)
        if context.by_parts:
            out = delta_rule_over_ranks(context, query, key, value, decay, beta)
        else:
            keep = is_recomputed(self.config, "G", hidden_states)
            out, _ = gated_delta_rule(query, key, value, decay, beta, keep_states=keep)
        if context.by_heads:
            out = context.give_back(out.flatten(2)).unflatten(-1, (self.heads, -1))
        out = self.out_norm(out, gate.reshape(out.shape))
        return self.out_proj(sequence_first(out.flatten(2), packed_seq_params))

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """The fused projection and convolution are stored by section, so that any tensor-parallel size can load them."""
        conv = {name: self.sections[name] for name in ("query", "key", "value")}
        splits = {"in_proj.weight": self.sections, "conv1d.weight": conv}
        return sharded_mixer_state(self, prefix, sharded_offsets, metadata, self.tp_group, splits)
