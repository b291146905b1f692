"""Closed-form output projections: the last linear map of each mixer and MLP is the least-squares fit to the teacher's output.

Layer by layer, all tokens through one layer at a time. With features F (what the projection W is applied to), the
teacher's output a, hidden states h_s of the student and h_t of the teacher, and a weight w a token,

    W  = argmin sum_n w_n |F_n W^T - a_n|^2  + damping |W - W_prior|^2                  the layer's own output
    W' = argmin sum_n w_n |F_n W'^T - (a_n + h_t,n - h_s,n)|^2 + damping' |W' - W|^2    sequential: and what is missing so far

`sequential`: a student layer reads the student's own hidden state and makes up for what the layers before it got wrong,
as far as that holds on windows that are not solved on: damping' is the best of a few there, infinity among them, so with
little text the correction vanishes. There w_n = 1 / (|h_t,n|^2 + |h_s,n|^2): layers see hidden states through RMSNorm, so
what is missing counts relative to them; else the first token of a window, a thousand times larger than others, decides it.
One-shot: a layer reads h_t, as if all others were exact, and W is the solution, with w_n = 1: it costs nothing to leave
the first token, which all heads attend to, as exact as its size makes it, and training then starts more calmly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron_hylo.calibrate.gather import embed, micro_batch
from megatron_hylo.config import ConfigError
from megatron_hylo.config.mixers import get_mixer
from megatron_hylo.config.mlps import EXPERTS_SYMBOL
from megatron_hylo.distill.alignment import mixer_output, relative_distance
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.models.mamba2 import Mamba2
from megatron_hylo.models.streamed import ModelParts, as_parts
from megatron_hylo.platform.distributed import device

DAMPING = 1e-2  # of the mean diagonal of F^T F
CORRECTION_DAMPING = (1e-2, 1e-1, 1.0)
VALIDATION = 8  # every so manieth window is not solved on


@dataclass
class LayerError:
    """Errors of a mixer layer, and of the model up to it, against the teacher, on windows not used for solving."""

    layer: int
    symbol: str
    initial: float  # squared error of the mixer's output over the teacher's energy, as initialised
    solved: float  # the same with the solved projection, before it corrects for other layers
    hidden: float  # mean over tokens of |h_s - h_t|^2 / (|h_s|^2 + |h_t|^2) before the MLP; 1: unrelated


class NormalEquations:
    """Normal equations of a linear least-squares problem: sums of products, float64 over fp32 micro-batches."""

    def __init__(self) -> None:
        self.sums: tuple[Tensor, Tensor, Tensor] | None = None  # F^T F [in, in], F^T own and F^T missing [in, out]
        self.energy = 0.0

    def add(self, features: Tensor, own: Tensor, missing: Tensor, weight: Tensor) -> None:
        """Add one micro-batch to the sums.

        Args:
            features: [..., in].
            own: the layer's own target, [..., out].
            missing: what the target has beside it, [..., out].
            weight: [...].
        """
        root = weight.flatten().sqrt()[:, None]
        f, y, d = (part.flatten(0, -2).float() * root for part in (features, own, missing))
        gram, cross, residual = (product.double() for product in (f.T @ f, f.T @ y, f.T @ d))
        if self.sums is None:
            self.sums = gram, cross, residual
        else:
            self.sums = self.sums[0] + gram, self.sums[1] + cross, self.sums[2] + residual
        self.energy += float((y + d).double().square().sum())

    def solve(self, prior: Tensor, damping: float, missing: bool = False) -> Tensor:
        """Solve for the projection [out, in], float64, regularised towards `prior`, for the own target or all of it."""
        assert self.sums is not None, "no micro-batch was added"
        gram, own, residual = self.sums
        level = damping * gram.diagonal().mean()
        cross = own + residual if missing else own
        regular = gram + level * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        return torch.cholesky_solve(cross + level * prior.double().T, torch.linalg.cholesky_ex(regular)[0]).T

    def error(self, projection: Tensor) -> float:
        """Return the sum of squared errors of a projection [out, in] on all of the target."""
        assert self.sums is not None, "no micro-batch was added"
        gram, own, residual = self.sums
        w = projection.double().T
        return float((w * (gram @ w - 2 * (own + residual))).sum()) + self.energy


class Finished(Protocol):
    """Layers that an earlier run solved, and what is done with each that is solved now."""

    def error(self, layer: int) -> LayerError | None:
        """Return the errors of a layer whose solved weights the student already has."""
        ...

    def keep(self, error: LayerError, mixer: nn.Module, mlp: nn.Module) -> None:
        """Keep a layer that was solved."""
        ...


@torch.no_grad()
def solve_outputs(
    student: HyloModel | ModelParts,
    teacher: HyloModel | ModelParts,
    windows: Tensor,
    sequential: bool = False,
    mlps: bool = True,
    track: Track = no_progress,
    finished: Finished | None = None,
) -> list[LayerError]:
    """Re-solve the output projection of every `+`, `M` and `G` layer, and of MLPs, in place.

    One layer of a streamed student or teacher is loaded at a time; hidden states and features wait in the CPU's memory.

    Args:
        student: initialised, whole on this rank; what is solved of a streamed one is given to `finished` alone.
        teacher: attention in every layer, same depth, hidden size and embedding.
        windows: int64 [n, sequence + 1], n >= 2.
        sequential: on the student's own hidden states instead of the teacher's.
        mlps: with `sequential`, let MLPs correct as well; else they stay the teacher's, as mixtures of experts always do.
        track: progress display over the layers.
        finished: layers that need not be solved again.

    Returns:
        The error of each layer, `*` layers too.

    Raises:
        ConfigError: a single window, or a layer whose outputs are not finite.
    """
    if len(windows) < 2:
        raise ConfigError(f"solving output projections needs at least 2 windows, got {len(windows)}; calibrate on more tokens")
    student, teacher = as_parts(student), as_parts(teacher)
    period = min(VALIDATION, len(windows))
    held = torch.arange(len(windows)) % period == period - 1
    size = micro_batch(windows.shape[1] - 1)
    ids = windows[:, :-1]
    parts = [(part, False) for part in ids[~held].split(size)] + [(part, True) for part in ids[held].split(size)]
    taught = embed(teacher, [part for part, _ in parts])
    studied = list(taught)
    validation = [is_held for _, is_held in parts]
    errors = []
    for layer, symbol in enumerate(track(student.config.hylo.mixers, "solve")):
        description, done = get_mixer(symbol), finished.error(layer) if finished is not None else None
        with student.layer(layer) as (mixer, mlp), teacher.layer(layer) as (teacher_mixer, teacher_mlp):
            if description.norm_after_gate and done is None:
                _match_norm(mixer.self_attention, mixer.input_layernorm(studied[0].to(device()))[0])
            own = [mixer_output(teacher_mixer, h.to(device())).cpu() for h in taught]
            projection = output_projection(mixer.self_attention)
            features = [_features(projection, mixer_output, mixer, h) for h in studied]
            initial = solved = _relative_error(features, own, projection.weight, validation) if done is None else 0.0
            if description.output_fit != "keep" and done is None:
                known = description.output_fit == "from_initial"
                prior = projection.weight.clone() if known else torch.zeros_like(projection.weight)
                fit, check = _normal_equations(features, own, taught, studied, validation, sequential)
                weight = fit.solve(prior, DAMPING)
                solved = _relative_error(features, own, weight, validation)
                _set(projection, _corrected(weight, fit, check) if sequential else weight, layer, symbol)
            _advance(taught, own)
            _advance(studied, _outputs(features, projection.weight))
            errors.append(done or LayerError(layer, symbol, initial, solved, _distance(taught, studied, validation)))

            own = [_mlp_output(teacher_mlp, h.to(device())).cpu() for h in taught]
            outputs: list[Tensor] = []
            if sequential and student.config.hylo.mlps[layer] == EXPERTS_SYMBOL:  # stay the teacher's
                outputs = [_mlp_output(mlp, h.to(device())).cpu() for h in studied]
            elif sequential:
                projection = mlp.mlp.linear_fc2
                features = [_features(projection, _mlp_output, mlp, h) for h in studied]
                if mlps and done is None:
                    fit, check = _normal_equations(features, own, taught, studied, validation, sequential)
                    weight = fit.solve(projection.weight, DAMPING)
                    _set(projection, _corrected(weight, fit, check), layer, "-")
                outputs = _outputs(features, projection.weight)
            _advance(taught, own)
            if sequential:
                _advance(studied, outputs)
            else:
                studied = list(taught)
            if finished is not None and done is None:
                finished.keep(errors[-1], mixer, mlp)
    return errors


def output_projection(mixer: Any) -> Any:
    """The last linear map of a mixer: `linear_proj` of attention and MLA, `out_proj` of the linear mixers."""
    return mixer.linear_proj if hasattr(mixer, "linear_proj") else mixer.out_proj


def _mlp_output(layer: Any, hidden: Tensor) -> Tensor:
    return layer.mlp(layer.pre_mlp_layernorm(hidden)[0])[0]


def _features(projection: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module, hidden: Tensor) -> Tensor:
    """Capture the input of a layer's output projection."""
    seen = []
    hook = projection.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        run(layer, hidden.to(device()))
    finally:
        hook.remove()
    return seen[0].cpu()


def _normal_equations(
    features: list[Tensor],
    own: list[Tensor],
    taught: list[Tensor],
    studied: list[Tensor],
    validation: list[bool],
    relative: bool,
) -> tuple[NormalEquations, NormalEquations]:
    """Normal equations over the micro-batches solved on, and over the held-out ones; `relative` to hidden states' sizes."""
    fit, check = NormalEquations(), NormalEquations()
    for f, a, t, s, is_held in zip(features, own, taught, studied, validation):
        f, a, t, s = (part.to(device()) for part in (f, a, t, s))
        weight = _weight(t, s) if relative else torch.ones_like(t[..., 0], dtype=torch.float32)
        (check if is_held else fit).add(f, a, t - s, weight)
    return fit, check


def _corrected(weight: Tensor, fit: NormalEquations, check: NormalEquations) -> Tensor:
    """Choose, on `check`, the best of `weight` and its corrections."""
    return min([weight, *(fit.solve(weight, damping, missing=True) for damping in CORRECTION_DAMPING)], key=check.error)


def _set(projection: Any, weight: Tensor, layer: int, symbol: str) -> None:
    if not weight.isfinite().all():
        raise ConfigError(f"layer {layer} `{symbol}`: its outputs are not finite on the calibration text; use fp32")
    projection.weight.copy_(weight)


def _outputs(features: list[Tensor], weight: Tensor) -> list[Tensor]:
    return [(f.to(device()) @ weight.T.to(f.dtype)).cpu() for f in features]


def _advance(hidden: list[Tensor], outputs: list[Tensor]) -> None:
    for i, out in enumerate(outputs):
        hidden[i] = hidden[i] + out


def _weight(taught: Tensor, studied: Tensor) -> Tensor:
    return 1 / (taught.float().square().sum(-1) + studied.float().square().sum(-1))


def _relative_error(features: list[Tensor], targets: list[Tensor], weight: Tensor, validation: list[bool]) -> float:
    held = [(f.to(device()), y.to(device())) for f, y, is_held in zip(features, targets, validation) if is_held]
    rows = [(f @ weight.T.to(f) - y, y) for f, y in held]
    lost, energy = (sum(part.float().square().sum() for part in parts) for parts in zip(*rows))
    return float(lost / energy)


def _distance(taught: list[Tensor], studied: list[Tensor], validation: list[bool]) -> float:
    rows = [relative_distance(s, t) for t, s, is_held in zip(taught, studied, validation) if is_held]
    return float(torch.cat(rows, 1).mean())


def _match_norm(mixer: Mamba2, x: Tensor) -> None:
    """Shrink Mamba2's steps until the input of its norm is as large as the root of the norm's epsilon.

    The norm comes after the gate and would cancel a gate that is one number a head; at this size it lets lengths through.
    Rates grow as steps shrink, so states decay as before. Both are logarithms, or nearly: a training step changes them as
    little as before, which it would not do to values made as small.
    """
    seen = []
    hook = mixer.norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    try:
        mixer(x, attention_mask=None)
    finally:
        hook.remove()
    y, z = seen[0][:2]
    size = (y.float() * torch.nn.functional.silu(z.float())).square().mean().sqrt()
    if size > 0:
        ratio = mixer.config.layernorm_epsilon**0.5 / size
        steps = torch.nn.functional.softplus(mixer.dt_bias) * ratio
        mixer.dt_bias.copy_(steps.expm1().log())
        mixer.A_log.sub_(ratio.log())
