"""Taylor-Calibrate's closed-form start of Gated DeltaNet (arXiv:2606.16429, phase 1), to compare with; MLA as `calibrated`.

Half-lives are the mean distance that a head looks back, writing is stronger in heads that attend to few tokens, and the gate is
a small multiple of the values, so that a layer is nearly silent until stage 1 (its phase 2) has aligned it. Three differences:
its layers have no convolutions, so these pass the current token alone; the window's first token, on which heads rest that look
at nothing, does not count as a distance; and values keep their scale, which the norm behind the recurrence divides out.
"""

import math

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn.functional import silu

from megatron_hylo.config import ConfigError, ModelConfig
from megatron_hylo.config.mixers import get_mixer
from megatron_hylo.initialise.calibrated_linear import pass_current
from megatron_hylo.initialise.calibrated_mla import mla_from_attention
from megatron_hylo.initialise.defaults import delta_rule_defaults
from megatron_hylo.initialise.paper import expand_heads
from megatron_hylo.initialise.registry import CalibrationStatistics, TeacherLayer, needed_statistics, register_initialiser

SHORTEST, DECAYS = 0.5, (1e-3, 5.0)  # least distance in tokens; bounds of a token's decay in nats
WRITING = (0.3, 0.7)  # writing strength of the head that attends most widely, and of the one that does most narrowly
GATE = 0.01  # length of the gated values over that of the attention's output

register_initialiser("taylor", "+")(mla_from_attention)


@register_initialiser("taylor", "G")
def gated_delta_net_from_attention(
    teacher: TeacherLayer,
    config: ModelConfig,
    teacher_config: ModelConfig,
    generator: Generator,
    statistics: CalibrationStatistics | None = None,
) -> dict[str, Tensor]:
    """Gated DeltaNet with W_Q, W_K, W_V, W_O of the attention and gates by the formulas of Taylor-Calibrate's phase 1.

    Per head, with d its mean distance and e the entropy of its attention: decay g = clip(ln 2 / max(d, .5), 1e-3, 5) nats a
    token, dt_bias = softplus^-1(g); writing .3 + .4 (1 - (e - min e) / (max e - min e)), the mean size of its random row being
    logit(writing) / sqrt(hidden size). The gate is alpha W_V with alpha = .01 rms(attention's output) / rms(silu(v)), v taken
    for normal with its measured variance.

    Args:
        teacher: one attention layer; QKV biases and q/k-norm have no place in the student and are left out.
        config: of the student; must have as many heads, of the same size, as the attention has for queries.
        teacher_config: of the teacher.
        generator: draws the rows of a_proj and b_proj.
        statistics: of this layer, with its attention_entropy.

    Returns:
        The `linear_attn.*` tensors of `get_mixer("G").tensors(config)`, fp32.

    Raises:
        ConfigError: other heads, no statistics, or statistics of a version that did not measure the entropy.
    """
    heads, width = teacher_config.num_attention_heads, teacher_config.kv_channels
    sizes = config.linear_num_heads, config.linear_key_head_dim, config.linear_value_head_dim
    if sizes != (heads, width, width):
        raise ConfigError(
            f"initialiser `taylor` keeps the attention's {heads} heads of {width}, got {sizes[0]} of {sizes[1]} and {sizes[2]} "
            f"channels; leave linear_num_heads and its sizes out (--shapes teacher)"
        )
    statistics = needed_statistics(statistics)
    if "attention_entropy" not in statistics:
        raise ConfigError("the calibration folder has no attention_entropy, which `taylor` needs; run `hylo calibrate` again")
    repeats = heads // teacher_config.num_query_groups
    moment = statistics["input_second_moment"].double()
    value = expand_heads(teacher["v_proj.weight"].to(moment.device, torch.float32), width, repeats)
    decay = (math.log(2) / statistics["attention_distance"].double().clamp(min=SHORTEST)).clamp(*DECAYS)
    entropy = statistics["attention_entropy"].double()
    narrow = 1 - (entropy - entropy.min()) / (entropy.max() - entropy.min()).clamp(min=1e-12)
    writing = (WRITING[0] + (WRITING[1] - WRITING[0]) * narrow).logit() / config.hidden_size**0.5
    variance = torch.einsum("ij,jk,ik->i", value.double(), moment, value.double())
    context = (statistics["head_energy"].double().mean() / width).sqrt()
    mixer = delta_rule_defaults("G", config, generator)
    rows = mixer["linear_attn.b_proj.weight"].to(moment.device)
    shapes = get_mixer("G").tensors(config)
    mixer |= {
        "linear_attn.q_proj.weight": teacher["q_proj.weight"],
        "linear_attn.k_proj.weight": expand_heads(teacher["k_proj.weight"], width, repeats),
        "linear_attn.v_proj.weight": value,
        "linear_attn.g_proj.weight": GATE * context / silu_rms(variance) * value,
        "linear_attn.b_proj.weight": rows * (writing / rows.double().abs().mean(1))[:, None],
        "linear_attn.A_log": torch.zeros(heads),
        "linear_attn.dt_bias": decay + (-(-decay).expm1()).log(),
        "linear_attn.o_proj.weight": teacher["o_proj.weight"],
    }
    mixer |= {name: pass_current(shape) for name, shape in shapes.items() if "conv1d" in name}
    return {name: mixer[name].to("cpu", torch.float32, copy=True).contiguous() for name in shapes}


def silu_rms(variance: Tensor) -> Tensor:
    """Root of the mean square of silu(v) for normal v of these variances, over all of them: [channels] -> []."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    values = silu(variance.sqrt()[:, None] * variance.new_tensor(nodes)) ** 2
    return ((values @ variance.new_tensor(weights)).mean() / math.sqrt(2 * math.pi)).sqrt()
