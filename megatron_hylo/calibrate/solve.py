"""Output projections in closed form: every mixer of a student gets the W_O that fits its teacher best with all else live.

Layer by layer, all tokens through one layer at a time, with features F (what W_O is applied to) and target Y,

    W_O = argmin |F W_O^T - Y|^2 + damping tr(F^T F)/n |W_O - W_prior|^2

`sequential`: a student layer reads the student's own hidden state h_s, and Y = a_t + (h_t - h_s), so that it makes up for
what the layers before it got wrong (a_t, h_t: the teacher's mixer output and hidden state). One-shot: it reads h_t and
Y = a_t, as if all others were exact. MLPs stay the teacher's.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_hylo.calibrate.gather import embed, micro_batch
from megatron_hylo.config import ConfigError
from megatron_hylo.convert.to_megatron import Track, no_progress
from megatron_hylo.distill.alignment import mlp_layer
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.models.mamba2 import Mamba2

DAMPING = {"+": 1e-2, "M": 1e-2, "G": 1e-2}
VALIDATION = 8  # every so manieth window is not solved on but measures the error


@dataclass
class LayerError:
    """Squared error of one mixer's output over the teacher's energy, on windows that were not solved on."""

    layer: int
    symbol: str
    initial: float  # with the output projection as initialised
    solved: float


@torch.no_grad()
def solve_outputs(
    student: HyloModel,
    teacher: HyloModel,
    windows: Tensor,
    sequential: bool = True,
    track: Track = no_progress,
) -> list[LayerError]:
    """Re-solve the output projection of every `+`, `M` and `G` layer, in place.

    Args:
        student: initialised, whole on this rank.
        teacher: attention in every layer, same depth, hidden size and embedding.
        windows: int64 [n, sequence + 1], n >= 2.
        sequential: on the student's own hidden states instead of the teacher's.
        track: progress display over the layers.

    Returns:
        The error of each layer, `*` layers too.

    Raises:
        ConfigError: a single window, or a layer whose outputs are not finite.
    """
    if len(windows) < 2:
        raise ConfigError(f"solving output projections needs at least 2 windows, got {len(windows)}; calibrate on more tokens")
    period = min(VALIDATION, len(windows))
    held = torch.arange(len(windows)) % period == period - 1
    size = micro_batch(windows.shape[1] - 1)
    ids = windows[:, :-1]
    batches = [(part, False) for part in ids[~held].split(size)] + [(part, True) for part in ids[held].split(size)]
    taught = [embed(teacher, part, size)[0] for part, _ in batches]
    studied = [hidden.clone() for hidden in taught]
    validation = [is_held for _, is_held in batches]
    errors = []
    layers = zip(student.config.hylo.mixers, student.mixer_layers(), teacher.mixer_layers())
    for layer, (symbol, (mixer, mlp), (teacher_mixer, teacher_mlp)) in enumerate(track(list(layers), "solve")):
        normed = [mixer.input_layernorm(h) for h in (studied if sequential else taught)]
        if symbol == "M":
            _match_norm(mixer.self_attention, normed[0])
        targets, energy, initial, features = [], [], [], []
        for i, (h_t, h_s, x) in enumerate(zip(taught, studied, normed)):
            a_t = teacher_mixer.self_attention(teacher_mixer.input_layernorm(h_t), attention_mask=None)[0]
            feature, out = _features(mixer.self_attention, x)
            targets.append(a_t + (h_t - h_s) if sequential else a_t)
            energy.append(a_t)
            initial.append(out)
            features.append(feature)
            taught[i] = h_t + a_t
        projection = output_projection(mixer.self_attention)
        if symbol != "*":
            prior = projection.weight.float() if symbol == "+" else torch.zeros_like(projection.weight, dtype=torch.float32)
            used = [(f, y) for f, y, is_held in zip(features, targets, validation) if not is_held]
            weight = ridge(iter(used), prior, DAMPING[symbol])
            if not weight.isfinite().all():
                raise ConfigError(f"layer {layer} `{symbol}`: its outputs are not finite on the calibration text; use fp32")
            projection.weight.copy_(weight)
        solved = [f @ projection.weight.T for f in features]
        errors.append(LayerError(layer, symbol, *(_error(x, targets, energy, validation) for x in (initial, solved))))
        for i, (h_s, out) in enumerate(zip(studied, solved)):
            studied[i] = mlp_layer(mlp, h_s + out)
            taught[i] = mlp_layer(teacher_mlp, taught[i])
    return errors


def ridge(pairs: Iterator[tuple[Tensor, Tensor]], prior: Tensor, damping: float) -> Tensor:
    """The weight [out, in] nearest to `prior` that maps features to targets.

    Args:
        pairs: (features [..., in], targets [..., out]); sums are float64.
        prior: [out, in] fp32.
        damping: of the mean diagonal of F^T F.
    """
    gram = cross = None
    for feature, target in pairs:
        f, y = feature.flatten(0, -2).double(), target.flatten(0, -2).double()
        gram = f.T @ f if gram is None else gram + f.T @ f
        cross = f.T @ y if cross is None else cross + f.T @ y
    level = damping * gram.diagonal().mean()
    gram.diagonal().add_(level)
    return torch.linalg.solve(gram, cross + level * prior.double().T).T.float()


def output_projection(mixer: nn.Module) -> nn.Module:
    """The last linear map of a mixer: `linear_proj` of attention and MLA, `out_proj` of the linear mixers."""
    return mixer.linear_proj if hasattr(mixer, "linear_proj") else mixer.out_proj


def _features(mixer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the output projection is applied to, and the mixer's output."""
    seen = []
    hook = output_projection(mixer).register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        out = mixer(x, attention_mask=None)[0]
    finally:
        hook.remove()
    return seen[0], out


def _match_norm(mixer: Mamba2, x: Tensor) -> None:
    """Scale Mamba2's values so that what its norm sees is as large as the root of the norm's epsilon.

    The norm comes after the gate and would cancel a gate that is one number a head; at this size it lets lengths through.
    """
    seen = []
    hook = mixer.norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    try:
        mixer(x, attention_mask=None)
    finally:
        hook.remove()
    y, z = seen[0]
    size = (y.float() * torch.nn.functional.silu(z.float())).square().mean().sqrt()
    if size > 0:
        mixer.conv1d.weight[: mixer.sections["x"]] *= mixer.config.layernorm_epsilon**0.5 / size


def _error(outputs: list[Tensor], targets: list[Tensor], energy: list[Tensor], validation: list[bool]) -> float:
    rows = [(o, y, e) for o, y, e, held in zip(outputs, targets, energy, validation) if held]
    lost = sum((o.float() - y.float()).square().sum() for o, y, _ in rows)
    return float(lost / sum(e.float().square().sum() for *_, e in rows))
