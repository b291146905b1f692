"""`G`: Gated DeltaNet with the paper's shapes (fla's layer: key width 0.75 d, values twice as wide, output gate).

S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - S_{t-1}^T k_t))^T,  o_t = S_t^T q_t / sqrt(d_k)      (HyLo, appendix A.3)
y = W_O (RMSNorm(o) * silu(W_G x)),  g = -exp(A_log) softplus(W_a x + dt_bias),  beta = sigmoid(W_b x)
"""

import functools

import torch.nn.functional as F
from torch import Tensor

from megatron_hylo.config import ModelConfig
from megatron_hylo.kernels.elementwise import elementwise
from megatron_hylo.kernels.gated_delta_rule import gated_delta_rule
from megatron_hylo.kernels.sections import split_sections
from megatron_hylo.kernels.ssd import RESET
from megatron_hylo.models.layers import HeadNorm, sharded_mixer_state
from megatron_hylo.models.linear_mixer import ShortConvolution, decay_parameters
from megatron_hylo.models.mixer import Mixer, MixerSubmodules, fused_column_linear, row_linear
from megatron_hylo.models.recompute import is_recomputed
from megatron_hylo.parallel.documents import Packed, batch_first, sequence_first
from megatron_hylo.parallel.recurrence import delta_rule_over_ranks


@elementwise
def gates_of(alpha: Tensor, beta: Tensor, decay_log: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Log decay g (fp32) and writing strength, [b, s, heads] each, from their projections and two parameters [heads]."""
    return -decay_log.exp() * F.softplus(alpha.float() + bias), beta.sigmoid()


class GatedDeltaNet(Mixer):
    """Linear attention with a delta-rule state of [key_head_dim, value_head_dim] a head."""

    symbol = "G"

    def build(self, c: ModelConfig, submodules: MixerSubmodules) -> None:
        """Make this tensor-parallel rank's weights."""
        config, tp = self.config, self.tp_group.size()
        self.heads = c.linear_num_heads // tp
        keys, values = self.heads * c.linear_key_head_dim, self.heads * c.linear_value_head_dim
        self.sections = {"query": keys, "key": keys, "value": values, "gate": values, "beta": self.heads}
        self.build_decay(c, submodules)
        self.in_proj = fused_column_linear(submodules, config, c.hidden_size, tp * sum(self.sections.values()), self.tp_group)
        self.conv1d = ShortConvolution(config, 2 * keys + values, bias=False, tp_group=self.tp_group)
        self.A_log, self.dt_bias = decay_parameters(self.symbol, self.heads, self.decays)
        self.out_norm = HeadNorm(config, c.linear_value_head_dim)
        self.out_proj = row_linear(submodules, config, tp * values, c.hidden_size, self.tp_group)

    def build_decay(self, c: ModelConfig, submodules: MixerSubmodules) -> None:
        """Set `decays`, the decays a token of this rank's heads, and make what computes them: here a section of in_proj."""
        self.decays = self.sections["alpha"] = self.heads

    def decay_input(self, hidden_states: Tensor, sections: dict[str, Tensor], packed: Packed) -> Tensor:
        """Decays before dt_bias and softplus, [batch, sequence, decays of this rank]; taken out of `sections` if there."""
        return sections.pop("alpha")

    def gates(self, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Log decay (fp32) and writing strength as `recurrence` takes them, of the heads this rank computes.

        Args:
            alpha: `decay_input`, [batch, sequence, decays].
            beta: writing strength before its sigmoid, [batch, sequence, heads].

        Returns:
            Two tensors of the same shapes.
        """
        own = self.context.head_shard
        return gates_of(alpha, beta, own(self.A_log), own(self.dt_bias))

    def recurrence(self, hidden_states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        """Run the recurrence over all tokens that this rank computes.

        Args:
            hidden_states: the mixer's input, which tells whether activations are recomputed.
            q, k, v: [batch, sequence, heads, channels].
            g, beta: log decay, fp32, and writing strength, of `gates`.

        Returns:
            [batch, sequence, heads, value_head_dim].
        """
        if self.context.uses_all_gather:
            return delta_rule_over_ranks(self.context, q, k, v, g, beta)
        keep_states = is_recomputed(self.config, self.symbol, hidden_states)
        return gated_delta_rule(q, k, v, g, beta, keep_states=keep_states)[0]

    def mix(self, hidden_states: Tensor, packed: Packed) -> tuple[Tensor, None]:
        """Mix tokens: [sequence (/ TP with sequence parallelism), batch, hidden] -> the same shape, and no bias.

        Shapes below: s tokens and n heads of this rank; with `a2a`, between `exchange` and `heads_to_sequence`, all tokens of
        its share of the heads.
        """
        c, context, documents = self.config.hylo, self.context, self.context.seen(packed)
        projected, _ = self.in_proj(hidden_states)  # [s, b, sum of section widths]
        # each section: [b, s, width]
        sections = dict(zip(self.sections, split_sections(batch_first(projected, packed), [*self.sections.values()])))
        gate = sections.pop("gate")  # [b, s, n dv]
        alpha = self.decay_input(hidden_states, sections, packed)  # [b, s, decays]
        *qkv, beta, alpha = context.exchange(*((x, [x.shape[-1]]) for x in (*sections.values(), alpha)))
        own = functools.partial(context.head_shard, widths=[self.sections[name] for name in ("query", "key", "value")])
        places = documents.own_positions if documents is not None else None
        # convolved sections: [b, s, n dk], [b, s, n dk], [b, s, n dv]
        qkv = self.conv1d(*context.tokens_before(qkv, c.linear_conv_kernel_dim - 1), places, own)
        query, key, value = (x.unflatten(-1, (beta.shape[-1], -1)) for x in qkv)  # [b, s, n, dk or dv]
        decay, beta = self.gates(alpha, beta)  # [b, s, n] (KDA's decay [b, s, n, dk]), [b, s, n]
        if documents is not None:
            reset_mask = documents.reset_mask.view(-1, *[1] * (decay.dim() - 2))  # [s, 1] or [s, 1, 1]
            decay = decay.masked_fill(reset_mask, RESET)
        out = self.recurrence(hidden_states, query, key, value, decay, beta)  # [b, s, n, dv]
        if context.uses_all_to_all:
            out = context.heads_to_sequence(out.flatten(2)).unflatten(-1, (self.heads, -1))
        out = self.out_norm(out, gate.reshape(out.shape))  # [b, s, heads of this rank, dv]
        return self.out_proj(sequence_first(out.flatten(2), packed))  # [s, b, h]

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """The fused projection and convolution are stored by section, so that any tensor-parallel size can load them."""
        conv = {name: self.sections[name] for name in ("query", "key", "value")}
        splits = {"in_proj.weight": self.sections, "conv1d.weight": conv}
        return sharded_mixer_state(self, prefix, sharded_offsets, metadata, self.tp_group, splits)
