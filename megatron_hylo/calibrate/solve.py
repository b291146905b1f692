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

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron_hylo.calibrate.gather import embed, micro_batch
from megatron_hylo.calibrate.shares import NormalEquations, Share, broadcast, from_first_rank
from megatron_hylo.config import ConfigError
from megatron_hylo.config.mixers import get_mixer
from megatron_hylo.config.mlps import EXPERTS_SYMBOL
from megatron_hylo.distill.alignment import mixer_output, relative_distance
from megatron_hylo.io import rank
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.models.mamba2 import Mamba2
from megatron_hylo.models.streamed import ModelParts, as_parts
from megatron_hylo.platform.distributed import device

DAMPING = 1e-2  # of the mean diagonal of F^T F
CORRECTION_DAMPING = (1e-2, 1e-1, 1.0)
VALIDATION = 8  # every so manieth window is not solved on
Hidden = dict[int, Tensor]  # by the number of the micro-batch, this rank's alone, where `embed` has put them


@dataclass
class LayerError:
    """Errors of a mixer layer, and of the model up to it, against the teacher, on windows not used for solving."""

    layer: int
    symbol: str
    initial: float  # squared error of the mixer's output over the teacher's energy, as initialised
    solved: float  # the same with the solved projection, before it corrects for other layers
    hidden: float  # mean over tokens of |h_s - h_t|^2 / (|h_s|^2 + |h_t|^2) before the MLP; 1: unrelated


class Finished(Protocol):
    """Layers that an earlier run solved, and what is done with each that is solved now."""

    def error(self, layer: int) -> LayerError | None:
        """Return the errors of a layer whose solved weights the student already has."""
        ...

    def keep(self, error: LayerError, mixer: nn.Module, mlp: nn.Module | None) -> None:
        """Keep a layer that was solved; its MLP where that was changed."""
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

    One layer of a streamed student or teacher is loaded at a time; hidden states and features wait where `embed` puts them.
    Ranks share the micro-batches; the result has the same bits on any number of ranks.

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
        ConfigError: a single window, a layer whose outputs are not finite, or more ranks than can share the work.
    """
    if len(windows) < 2:
        raise ConfigError(f"solving output projections needs at least 2 windows, got {len(windows)}; calibrate on more tokens")
    student, teacher = as_parts(student), as_parts(teacher)
    period = min(VALIDATION, len(windows))
    held = torch.arange(len(windows)) % period == period - 1
    size = micro_batch(windows.shape[1] - 1)
    ids = windows[:, :-1]
    parts = [(part, False) for part in ids[~held].split(size)] + [(part, True) for part in ids[held].split(size)]
    share = Share([is_held for _, is_held in parts])
    config = student.config.hylo  # kept: taught, own, features, outputs; sequential: studied, and features of an MLP
    kept = 4 + config.ffn_hidden_size / config.hidden_size if sequential else 4
    taught: Hidden = dict(zip(share.own, embed(teacher, [parts[i][0] for i in share.own], kept)))
    studied, errors = dict(taught), []
    for layer, symbol in enumerate(track(config.mixers, "solve")):
        done = finished.error(layer) if finished is not None else None
        if done is not None and not sequential:  # nothing else is asked of this layer's student
            with teacher.layer(layer) as (teacher_mixer, teacher_mlp):
                _advance(taught, _run(mixer_output, teacher_mixer, taught))
                _advance(taught, _run(_mlp_output, teacher_mlp, taught))
            studied = dict(taught)
            errors.append(done)
            continue
        with student.layer(layer, mlp=sequential) as (mixer, mlp), teacher.layer(layer) as (teacher_mixer, teacher_mlp):
            if done is None and get_mixer(symbol).norm_after_gate:
                _match_norm(mixer, studied)
            own = _run(mixer_output, teacher_mixer, taught)
            projection = output_projection(mixer.self_attention)
            features = {i: _features(projection, mixer_output, mixer, h) for i, h in studied.items()}
            initial = solved = _relative_error(share, features, own, projection.weight) if done is None else 0.0
            if done is None and (fit_to := get_mixer(symbol).output_fit) != "keep":
                prior = projection.weight.clone() if fit_to == "from_initial" else torch.zeros_like(projection.weight)
                fit, check = _normal_equations(share, features, own, taught, studied, prior, sequential)
                weight = from_first_rank(partial(fit.solve, prior, DAMPING), prior)
                solved = _relative_error(share, features, own, weight)
                if sequential:
                    weight = from_first_rank(partial(_corrected, weight, fit, check), prior)
                _set(projection, weight, layer, symbol)
            _advance(taught, own)
            wanted = features if sequential else {i: f for i, f in features.items() if share.held[i]}
            _advance(studied, _outputs(wanted, projection.weight))
            errors.append(done or LayerError(layer, symbol, initial, solved, _distance(share, taught, studied)))

            own = _run(_mlp_output, teacher_mlp, taught)
            if sequential and config.mlps[layer] == EXPERTS_SYMBOL:  # stay the teacher's
                _advance(taught, own)
                _advance(studied, _run(_mlp_output, mlp, studied))
            elif sequential:
                projection = mlp.mlp.linear_fc2
                features = {i: _features(projection, _mlp_output, mlp, h) for i, h in studied.items()}
                if mlps and done is None:
                    prior = projection.weight
                    fit, check = _normal_equations(share, features, own, taught, studied, prior, sequential)
                    solution = from_first_rank(partial(fit.solve, prior, DAMPING), prior)
                    _set(projection, from_first_rank(partial(_corrected, solution, fit, check), prior), layer, "-")
                _advance(taught, own)
                _advance(studied, _outputs(features, projection.weight))
            else:
                _advance(taught, own)
                studied = dict(taught)
            if finished is not None and done is None:
                finished.keep(errors[-1], mixer, mlp if sequential and mlps else None)
    return errors


def output_projection(mixer: Any) -> Any:
    """The last linear map of a mixer: `linear_proj` of attention and MLA, `out_proj` of the linear mixers."""
    return mixer.linear_proj if hasattr(mixer, "linear_proj") else mixer.out_proj


def _run(run: Callable[[Any, Tensor], Tensor], layer: Any, hidden: Hidden) -> Hidden:
    """Run a part of a layer on all micro-batches of this rank."""
    return {i: run(layer, h.to(device())).to(h.device) for i, h in hidden.items()}


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
    return seen[0].to(hidden.device)


def _normal_equations(
    share: Share, features: Hidden, own: Hidden, taught: Hidden, studied: Hidden, weight: Tensor, relative: bool
) -> tuple[NormalEquations, NormalEquations]:
    """Normal equations over the micro-batches solved on, and over the held-out ones; whole on the first rank alone.

    Args:
        share: division of micro-batches over the ranks.
        features, own, taught, studied: of this rank's micro-batches.
        weight: the projection [out, in] that is solved for.
        relative: weigh tokens by the size of their hidden states.
    """
    whole = NormalEquations(), NormalEquations()
    for total, is_held in zip(whole, (False, True)):
        for members in share.rounds(is_held):
            part = NormalEquations()
            for i in members[rank()] if rank() < len(members) else ():
                f, a, t, s = (values[i].to(device()) for values in (features, own, taught, studied))
                part.add(f, a, t - s, _weight(t, s) if relative else torch.ones_like(t[..., 0], dtype=torch.float32))
            total.collect(part, [number for number, found in enumerate(members) if found], weight)
    return whole


def _corrected(weight: Tensor, fit: NormalEquations, check: NormalEquations) -> Tensor:
    """Choose, on `check`, the best of `weight` and its corrections."""
    return min([weight, *(fit.solve(weight, damping, missing=True) for damping in CORRECTION_DAMPING)], key=check.error)


def _set(projection: Any, weight: Tensor, layer: int, symbol: str) -> None:
    if not weight.isfinite().all():
        raise ConfigError(f"layer {layer} `{symbol}`: its outputs are not finite on the calibration text; use fp32")
    projection.weight.copy_(weight)


def _outputs(features: Hidden, weight: Tensor) -> Hidden:
    return {i: (f.to(device()) @ weight.T.to(f.dtype)).to(f.device) for i, f in features.items()}


def _advance(hidden: Hidden, outputs: Hidden) -> None:
    for i, out in outputs.items():
        hidden[i] = hidden[i] + out


def _weight(taught: Tensor, studied: Tensor) -> Tensor:
    return 1 / (taught.float().square().sum(-1) + studied.float().square().sum(-1))


def _relative_error(share: Share, features: Hidden, targets: Hidden, weight: Tensor) -> float:
    def terms(f: Tensor, y: Tensor) -> tuple[float, float]:
        """Sums of squares of what features [n, in] miss of targets [n, out], and of the targets."""
        lost = (f @ weight.T.to(f) - y).float().square().sum()
        return float(lost), float(y.float().square().sum())

    held = [i for i in share.own if share.held[i]]
    lost, energy = share.sum({i: terms(features[i].to(device()), targets[i].to(device())) for i in held})
    return lost / energy if energy else math.nan


def _distance(share: Share, taught: Hidden, studied: Hidden) -> float:
    held = [i for i in share.own if share.held[i]]
    distances = {i: relative_distance(studied[i], taught[i]) for i in held}
    total, tokens = share.sum({i: (float(part.double().sum()), part.numel()) for i, part in distances.items()})
    return total / tokens


def _match_norm(layer: Any, studied: Hidden) -> None:
    """Shrink Mamba2's steps until the input of its norm is as large as the root of the norm's epsilon.

    The norm comes after the gate and would cancel a gate that is one number a head; at this size it lets lengths through.
    Rates grow as steps shrink, so states decay as before. Both are logarithms, or nearly: a training step changes them as
    little as before, which it would not do to values made as small. The first rank measures, on the first micro-batch.
    """
    mixer: Mamba2 = layer.self_attention
    if rank() == 0:
        _shrink_steps(mixer, layer.input_layernorm(studied[0].to(device()))[0])
    for parameter in (mixer.dt_bias, mixer.A_log):
        broadcast(parameter.data)


def _shrink_steps(mixer: Mamba2, x: Tensor) -> None:
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
