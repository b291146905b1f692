"""Lossy codec of a teacher's last hidden states that puts the error where it hardly changes the output distribution.

A soft-max head turns an error e of a hidden state h into KL(p(h) || p(h + e)) = 1/2 e^T F(h) e + ..., with the Fisher matrix
F(h) = W^T (diag p - p p^T) W of the head W. Of tokens that are alike, the mean F of the Fisher matrices and the covariance C
of the hidden states give axes that make both diagonal: y = Q^T F^1/2 (h - mean), with Q the eigenvectors of F^1/2 C F^1/2.
There an error costs the same in every axis, so all are rounded with one step (reverse water-filling): axes that vary less than
it become 0 and cost nothing.

Tokens are not all alike: where the teacher is certain, F(h) is a hundredth of the mean. So each token is in one of a few
classes with mean, F and C of their own, and its step is divided by the root of its sharpness f = tr(F^-1 F(h)) / H, what an
error in y costs it against the mean token. (Bits fall by H log2(step) and KL grows as f step^2; where a bit buys the same KL
in all tokens, f step^2 is the same.) Its class is the one that takes fewest bits, which but for what all have in common are

    1/2 log2 det(F C) + H/2 log2 f + H/2 log2 e,    e = mean over the axes of (y / spread)^2

and classes are found by turns: tokens to classes, then mean, F and C of each (k-means, with bits for distance). The step is
chosen for a wanted mean KL, which is measured on tokens that nothing was fitted on.

So the full distribution can be made again from some hundred bytes a token, where the k most likely tokens would leave out
what thousands of others have: with k = 50 a tenth of the probability (the 135M teacher on documentation).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_hylo.config import ConfigError

CLASSES = 4
ROUNDS = 3  # of k-means; the bytes of each are fewer by less than the last's
MIXED = 0.003  # weight of every token in every class, so that none is of too few
MEASURED = 2048  # tokens that the KL is measured on
GRID = 4  # spreads and steps are powers of 2^(1/GRID)
LEAST_SHARP = 0.0015  # sharpness below counts as this: rounding errors and far errors are not much smaller
FARTHEST = 0.1  # nats that the longest step would cost at sharpness 1: far errors cost more than 1/2 e^T F e says
TINY = 1e-9  # of the largest eigenvalue: directions that the head does not see
LARGEST = 2**15 - 1  # code
SIDE = 3  # columns before the codes: class, step and spread of the token


class _Placed(NamedTuple):
    """Tokens expressed in the axes of their classes."""

    kind: Tensor  # class, int64 [n]
    sharp: Tensor  # f, fp64 [n]
    energy: Tensor  # e, fp64 [n]
    y: Tensor  # fp64 [n, H]


@dataclass
class HiddenCodec:
    """Codec of a token of class k: y = round((h - mean_k) A_k^T / step), decoded as h = mean_k + step y B_k^T.

    Three columns stand before the codes: the class; s, which makes the token's step `step` 2^(s/4); and g, with which an axis
    is expected to spread as 2^((level + g)/4), so that `code_blocks` knows what to compress together.
    """

    mean: Tensor  # fp64 [K, H]
    to_axes: Tensor  # A, fp64 [K, H, H]
    from_axes: Tensor  # B, fp64 [K, H, H]
    levels: Tensor  # of the spread of y, int16 [K, H]: 2^(level/4), falling
    step: float = 1.0
    least: float = 1.0  # sharpness below which steps are no longer

    def encode(self, hidden: Tensor, head: Tensor, chunk: int = 128) -> Tensor:
        """Encode [N, H], given the head [V, H], as int16 [N, 3 + H]; values beyond 32,767 steps are clipped."""
        return torch.cat([self.rounded(placed) for _, _, placed in self.place(hidden, head, chunk)])

    def rounded(self, placed: _Placed) -> Tensor:
        """Quantise one batch to codes int16 [n, 3 + H]."""
        sharp = placed.sharp.clamp(min=self.least)
        s, g = (-GRID / 2 * sharp.log2()).round(), (GRID / 2 * placed.energy.log2()).round()
        y = (placed.y / (self.step * torch.exp2(s / GRID))[:, None]).round().clamp(-LARGEST, LARGEST)
        return torch.cat([torch.stack([placed.kind, s, g], 1).short(), y.short()], 1)

    def place(self, hidden: Tensor, head: Tensor, chunk: int = 128) -> Iterator[tuple[Tensor, Tensor, _Placed]]:
        """Assign tokens [N, H] to the classes that take fewest bits, given the head [V, H].

        Yields:
            For `chunk` tokens after others p, fp32 [n, V]; p W, fp32 [n, H], of W less its mean row; and where they are placed.
        """
        weight, back, width = _centred(head), self.from_axes.float(), hidden.shape[1]
        seen = torch.stack([(weight @ b).square().sum(1) for b in back], 1)  # |B^T w|^2: [V, K]
        spread = torch.exp2(self.levels.double() / GRID)[:, None]
        for part in hidden.split(chunk):
            p = torch.softmax(part.float() @ weight.T, -1)
            centre = p @ weight
            # tr(F^-1 F(h)), F^-1 = B B^T
            sharp = ((p @ seen).T - (centre @ back).square().sum(-1)).double() / width
            sharp = sharp.clamp(min=LEAST_SHARP)
            y = (part.double() - self.mean[:, None]) @ self.to_axes.mT  # [K, n, H]
            energy = (y / spread).square().mean(-1).clamp(min=TINY)
            bits = self.levels.sum(1)[:, None] / GRID + width / 2 * (sharp * energy).log2()  # [K, n]
            kind = bits.argmin(0)
            row = torch.arange(len(part), device=kind.device)
            yield p, centre, _Placed(kind, sharp[kind, row], energy[kind, row], y[kind, row])

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode int16 [..., 3 + H] to hidden states [..., H] in `dtype`, on the codes' device, computed in fp32."""
        mean, back = self.mean.to(codes.device).float(), self.from_axes.to(codes.device).float()
        flat = codes.flatten(0, -2)
        y = self.step * torch.exp2(flat[:, 1:2].float() / GRID) * flat[:, SIDE:].float()
        out = torch.empty_like(y, dtype=dtype)
        for kind in range(len(mean)):
            rows = (flat[:, 0] == kind).nonzero()[:, 0]
            out[rows] = (mean[kind] + y[rows] @ back[kind].T).to(dtype)
        return out.unflatten(0, codes.shape[:-1])

    def tensors(self) -> dict[str, Tensor]:
        """Return the codec as named tensors for a safetensors file: its fields, and "step", float64 [2], step and least."""
        step = torch.tensor([self.step, self.least], dtype=torch.float64)
        return {"mean": self.mean, "to_axes": self.to_axes, "from_axes": self.from_axes, "levels": self.levels, "step": step}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "HiddenCodec":
        """Rebuild a codec from the result of `tensors`, on the tensors' device; KeyError where one is missing."""
        step, least = tensors["step"].tolist()
        return cls(tensors["mean"], tensors["to_axes"], tensors["from_axes"], tensors["levels"], step, least)


@torch.no_grad()
def fit_codec(hidden: Tensor, head: Tensor, kl: float, chunk: int = 128) -> tuple[HiddenCodec, Tensor]:
    """Fit a codec to a mean KL of `kl` nats a token.

    Args:
        hidden: floating [N, H], N >= 4 H, of text like that to be stored, from many places: some 2,048 tokens, at most every
            fourth, are not fitted on but measured.
        head: [V, H].
        kl: wanted mean of KL(teacher || made again).
        chunk: tokens whose logits exist at a time.

    Returns:
        The codec, and the KL of each measured token, fp32.

    Raises:
        ConfigError: too few tokens, or a KL that is not positive or cannot be reached.
    """
    width = hidden.shape[1]
    if len(hidden) < 4 * width:
        raise ConfigError(f"{len(hidden)} tokens are too few to fit a codec of {width} channels; give at least {4 * width}")
    every = max(4, len(hidden) // MEASURED)
    held = torch.arange(len(hidden), device=hidden.device) % every == every - 1
    codec = fit_axes(hidden[~held], head, chunk)
    return codec, fit_step(codec, hidden[held], head, kl, chunk)


@torch.no_grad()
def fit_axes(hidden: Tensor, head: Tensor, chunk: int = 128) -> HiddenCodec:
    """Fit classes and axes to hidden states [N, H] and a head [V, H], with step 1."""
    width = hidden.shape[1]
    eye = torch.eye(width, dtype=torch.float64, device=hidden.device)[None]
    codec = HiddenCodec(0 * eye[:, 0], eye, eye, torch.zeros(1, width, dtype=torch.int16, device=hidden.device))
    one = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    codec, sharp = _refit(codec, hidden, head, chunk, one)
    codec, _ = _refit(codec, hidden, head, chunk, sharp.argsort().argsort() * CLASSES // len(hidden))
    for _ in range(ROUNDS):
        codec, _ = _refit(codec, hidden, head, chunk)
    return codec


def _refit(
    codec: HiddenCodec, hidden: Tensor, head: Tensor, chunk: int, kinds: Tensor | None = None
) -> tuple[HiddenCodec, Tensor]:
    """Fit a codec of classes int64 [N] (default: `codec`'s own choice); also returns the tokens' sharpness in it, fp64 [N]."""
    count = len(codec.mean) if kinds is None else int(kinds.max()) + 1
    weight, (vocabulary, width) = _centred(head), head.shape
    total, first = hidden.new_zeros(count, 1, dtype=torch.float64), hidden.new_zeros(count, width, dtype=torch.float64)
    second, outer = (hidden.new_zeros(count, width, width, dtype=torch.float64) for _ in range(2))
    likely, found = hidden.new_zeros(count, vocabulary, dtype=torch.float64), []
    for i, (p, centre, placed) in enumerate(codec.place(hidden, head, chunk)):
        rows = slice(i * chunk, (i + 1) * chunk)
        tokens, kind = hidden[rows].double(), placed.kind if kinds is None else kinds[rows]
        share = (torch.nn.functional.one_hot(kind, count).double() + MIXED).T  # [K, n]
        equal = share / placed.sharp  # every token's F counts as much as its bits do
        total += share.sum(1, keepdim=True)
        first += share @ tokens
        second += (share[..., None] * tokens).mT @ tokens
        likely += (equal.float() @ p).double()
        outer += (equal[..., None] * centre).mT @ centre.double()
        found.append(placed.sharp)
    mean, sharp, made = first / total, torch.cat(found), []
    for k in range(count):
        fisher = ((weight * likely[k, :, None].float()).T @ weight).double() - outer[k]
        fisher *= sharp.mean() / total[k]  # so that the sharpness is 1 in the mean
        made.append(_axes(fisher, second[k] / total[k] - torch.outer(mean[k], mean[k])))
    to_axes, from_axes, levels = (torch.stack(tensors) for tensors in zip(*made))
    return HiddenCodec(mean, to_axes, from_axes, levels), sharp


def _axes(fisher: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return A, B and the levels of the axes that make both matrices diagonal, in order of falling spread."""
    values, vectors = torch.linalg.eigh(fisher)
    values = values.clamp(min=TINY * values[-1])
    root, inverse_root = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
    spread, axes = torch.linalg.eigh(root @ covariance @ root)
    spread, axes = spread.clamp(min=TINY * spread[-1]).flip(-1), axes.flip(-1)
    return axes.T @ root, inverse_root @ axes, (GRID / 2 * spread.log2()).round().short()


@torch.no_grad()
def fit_step(codec: HiddenCodec, hidden: Tensor, head: Tensor, kl: float, chunk: int = 128) -> Tensor:
    """Set the codec's steps for a mean KL of `kl` nats of hidden states [N, H]; returns the KL of each, fp32 [N].

    Raises:
        ConfigError: a KL that is not positive or cannot be reached.
    """
    if kl <= 0:
        raise ConfigError(f"kl must be positive, got {kl}; 1e-3 can hardly be told from the teacher")
    placed = _Placed(*map(torch.cat, zip(*(part for _, _, part in codec.place(hidden, head, chunk)))))
    codec.least = min(1.0, kl / FARTHEST)
    stepped = placed.y * placed.sharp.clamp(min=codec.least).sqrt()[:, None]
    finest = 2 * stepped.abs().max().item() / LARGEST  # a code is 16 bits
    codec.step = max((24 * kl / hidden.shape[1]) ** 0.5, finest)  # 1/2 H step^2 / 12 = kl
    for _ in range(4):  # KL grows as the square of the step, but for axes that are all rounded to 0
        found = token_kl(hidden, codec.decode(codec.rounded(placed)), head, chunk)
        codec.step = max(codec.step * (kl / found.mean().item()) ** 0.5, finest)
    found = token_kl(hidden, codec.decode(codec.rounded(placed)), head, chunk)
    if found.mean() > 2 * kl:
        raise ConfigError(f"kl {kl:g} is finer than codes of 16 bits; the finest here is {found.mean():.1e}")
    return found


def _centred(head: Tensor) -> Tensor:
    """Subtract the mean row of a head, fp32 [V, H]: the distributions stay, large common terms go."""
    return head.float() - head.float().mean(0)


def token_kl(hidden: Tensor, other: Tensor, head: Tensor, chunk: int = 128) -> Tensor:
    """Return KL(p(hidden) || p(other)) of every token, p the softmax of the head: [N, H] twice -> fp32 [N]."""
    weight, found = head.float(), []
    for ours, theirs in zip(hidden.float().split(chunk), other.float().split(chunk)):
        # sums in fp64: fp32 would round away what is below 1e-7
        log_p, log_q = (torch.log_softmax((x @ weight.T).double(), -1) for x in (ours, theirs))
        found.append((log_p.exp() * (log_p - log_q)).sum(-1).float())
    return torch.cat(found)
