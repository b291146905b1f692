"""`K`: Kimi Delta Attention, Gated DeltaNet with a decay for each key channel (Kimi Linear, arXiv:2510.26692).

S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T,  g = -exp(A_log) softplus(W_fb W_fa x + dt_bias)
"""

import torch.nn.functional as F
from torch import Tensor

from megatron_hylo.config import ModelConfig
from megatron_hylo.kernels.elementwise import elementwise
from megatron_hylo.kernels.kda import kda
from megatron_hylo.kernels.recurrence_part import KdaPart
from megatron_hylo.models.gdn import GatedDeltaNet
from megatron_hylo.models.layers import ReplicatedLinear
from megatron_hylo.models.mixer import MixerSubmodules, column_linear
from megatron_hylo.parallel.documents import Packed, batch_first
from megatron_hylo.parallel.recurrence import delta_rule_over_ranks


@elementwise
def channel_gates(alpha: Tensor, beta: Tensor, decay_log: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Log decay g (fp32) and writing strength from alpha [b, s, n, dk], beta [b, s, n], decay_log [n] and bias [n, dk]."""
    return -decay_log.exp()[:, None] * F.softplus(alpha.float() + bias), beta.sigmoid()


class KimiDeltaAttention(GatedDeltaNet):
    """Gated DeltaNet whose decay is a vector of key_head_dim for each head, from a projection of low rank."""

    symbol = "K"

    def build_decay(self, c: ModelConfig, submodules: MixerSubmodules) -> None:
        """The two maps to the decays, the first of them whole on every tensor-parallel rank."""
        self.decays = self.sections["key"]
        width = c.linear_num_heads * c.linear_key_head_dim
        self.decay_down_proj = ReplicatedLinear(c.hidden_size, c.kda_decay_rank, self.config)
        self.decay_up_proj = column_linear(submodules, self.config, c.kda_decay_rank, width, self.tp_group)

    def decay_input(self, hidden_states: Tensor, sections: dict[str, Tensor], packed: Packed) -> Tensor:
        """Decays before dt_bias and softplus from the low-rank projection, [b, s, key channels of this rank]."""
        low_rank = self.decay_down_proj(hidden_states)  # [s, b, kda_decay_rank]
        alpha, _ = self.decay_up_proj(low_rank)  # [s, b, n dk]
        return batch_first(alpha, packed)  # [b, s, n dk]

    def gates(self, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Log decay [batch, sequence, heads, key_head_dim] (fp32) and writing strength, of the heads this rank computes."""
        own, heads = self.context.head_shard, beta.shape[-1]
        bias = own(self.dt_bias).view(heads, -1)
        return channel_gates(alpha.unflatten(-1, (heads, -1)), beta, own(self.A_log), bias)

    def recurrence(self, hidden_states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        """Outputs [batch, sequence, heads, value_head_dim] from queries, keys, values, log decay and writing strength."""
        if self.context.uses_all_gather:
            return delta_rule_over_ranks(self.context, q, k, v, g, beta, kind=KdaPart)
        return kda(q, k, v, g, beta)[0]
