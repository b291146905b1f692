"""KDA against a plain token-by-token reference with the same weights: outputs, and gradients of input and weights."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hylo.kernels.norm import gated_rms_norm
from tests.conftest import tiny_config
from tests.models.mixers import TOLERANCE, Weights, errors, random_mixer


def test_kda_matches_a_plain_recurrence(one_rank):
    c = tiny_config("K-", linear_num_heads=3)
    heads, dk, dv, eps = 3, c.linear_key_head_dim, c.linear_value_head_dim, c.layernorm_epsilon

    def oracle(w: Weights, x: Tensor) -> Tensor:
        query, key, value, gate, beta = F.linear(x, w["in_proj.weight"]).split(
            [heads * dk, heads * dk, heads * dv, heads * dv, heads], -1
        )
        mixed = torch.cat([query, key, value], -1).transpose(1, 2)
        mixed = F.conv1d(F.pad(mixed, (3, 0)), w["conv1d.weight"], groups=mixed.shape[1]).transpose(1, 2)
        query, key, value = F.silu(mixed).split([heads * dk, heads * dk, heads * dv], -1)
        query, key, value, gate = (t.unflatten(-1, (heads, -1)) for t in (query, key, value, gate))
        query, key = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (query, key))
        raw = F.linear(F.linear(x, w["decay_down_proj.weight"]), w["decay_up_proj.weight"]) + w["dt_bias"]
        decay = (-w["A_log"].exp()[:, None] * F.softplus(raw.unflatten(-1, (heads, -1)))).exp()
        state, outputs = x.new_zeros(len(x), heads, dk, dv), []
        for t in range(x.shape[1]):
            state = state * decay[:, t, :, :, None]
            missing = value[:, t] - torch.einsum("bhkv,bhk->bhv", state, key[:, t])
            state = state + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t].sigmoid(), key[:, t], missing)
            outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]) * dk**-0.5)
        out = gated_rms_norm(torch.stack(outputs, 1), gate, w["out_norm.weight"], eps, norm_before_gate=True)
        return F.linear(out.flatten(2), w["out_proj.weight"])

    found = errors(random_mixer(c), oracle, dtype=torch.float64)
    assert max(found.values()) < TOLERANCE, found
