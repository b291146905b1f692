"""The teacher's last hidden states in few bytes, with errors only where its output distribution hardly feels them.

A soft-max head turns an error e of a hidden state h into KL(p(h) || p(h + e)) = 1/2 e^T F(h) e + ..., with the Fisher matrix
F = W^T (diag p - p p^T) W of the head W. With its mean over some text and the covariance C of the hidden states, the axes
that make both diagonal are known: y = Q^T F^1/2 (h - mean), with Q the eigenvectors of F^1/2 C F^1/2. There an error costs
the same in every axis, so all are rounded with one step (reverse water-filling): axes that vary less than it become 0 and
cost nothing. The step is chosen for a wanted mean KL, which is measured on tokens that nothing was fitted on.

So the full distribution can be made again from some hundred bytes a token, where the k most likely tokens would leave out
what thousands of others have: with k = 50 a tenth of the probability (the 135M teacher on documentation).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hylo.config import ConfigError

FISHER_TOKENS = 2048  # that the mean Fisher matrix is of
TINY = 1e-9  # of the largest eigenvalue: directions that the head does not see
LARGEST = 2**15 - 1  # code
ENCODED = 8192  # tokens whose fp64 copies exist at a time


@dataclass
class HiddenCodec:
    """y = (h - mean) A^T / step, rounded; h = mean + step y B^T. The axes come in order of falling spread."""

    mean: Tensor  # fp64 [H]
    to_axes: Tensor  # A, fp64 [H, H]
    from_axes: Tensor  # B, fp64 [H, H]
    step: float

    def encode(self, hidden: Tensor) -> Tensor:
        """[N, H] -> codes int16 [N, H]; what does not fit is cut (32,767 steps are far beyond any token)."""
        parts = ((part.to(self.mean) - self.mean) @ self.to_axes.T / self.step for part in hidden.split(ENCODED))
        return torch.cat([y.round().clamp(-LARGEST, LARGEST).short() for y in parts])

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codes int16 [..., H] -> hidden states in `dtype`, on the codes' device, computed in fp32."""
        mean, back = self.mean.to(codes.device).float(), self.from_axes.to(codes.device).float()
        return (mean + self.step * codes.float() @ back.T).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """For a safetensors file."""
        step = torch.tensor([self.step], dtype=torch.float64)
        return {"mean": self.mean, "to_axes": self.to_axes.contiguous(), "from_axes": self.from_axes.contiguous(), "step": step}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "HiddenCodec":
        """What `tensors` gave."""
        return cls(tensors["mean"], tensors["to_axes"], tensors["from_axes"], tensors["step"].item())


@torch.no_grad()
def fit_codec(hidden: Tensor, head: Tensor, kl: float, chunk: int = 128) -> tuple[HiddenCodec, Tensor]:
    """The codec for a mean KL of `kl` nats a token.

    Args:
        hidden: floating [N, H], N >= 4 H, of text like that to be stored; every fourth is not fitted on but measured.
        head: [V, H].
        kl: wanted mean of KL(teacher || made again).
        chunk: tokens whose logits exist at a time.

    Returns:
        The codec, and the KL of each measured token, fp32.

    Raises:
        ConfigError: too few tokens, or a KL that is not positive or cannot be reached.
    """
    width = hidden.shape[1]
    if kl <= 0:
        raise ConfigError(f"kl must be positive, got {kl}; 1e-3 can hardly be told from the teacher")
    if len(hidden) < 4 * width:
        raise ConfigError(f"{len(hidden)} tokens are too few to fit a codec of {width} channels; give at least {4 * width}")
    held = torch.arange(len(hidden), device=hidden.device) % 4 == 3
    fitted, measured = hidden[~held], hidden[held][: max(FISHER_TOKENS, width)]
    fisher = _mean_fisher(fitted[:: max(1, len(fitted) // FISHER_TOKENS)], head, chunk)
    values, vectors = torch.linalg.eigh(fisher)
    values = values.clamp(min=TINY * values[-1])
    root, inverse_root = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
    mean = fitted.double().mean(0)
    spread, axes = torch.linalg.eigh(root @ torch.cov(fitted.double().T) @ root)
    axes = axes.flip(-1)
    codec = HiddenCodec(mean, axes.T @ root, inverse_root @ axes, 1.0)
    finest = 2 * ((fitted.double() - mean) @ codec.to_axes.T).abs().max().item() / LARGEST  # a code is 16 bits
    codec.step = max((24 * kl / width) ** 0.5, finest)  # 1/2 H step^2 / 12 = kl
    for _ in range(4):  # KL grows as the square of the step, but for axes that are all rounded to 0
        found = token_kl(measured, codec.decode(codec.encode(measured)), head, chunk)
        codec.step = max(codec.step * (kl / found.mean().item()) ** 0.5, finest)
    found = token_kl(measured, codec.decode(codec.encode(measured)), head, chunk)
    if found.mean() > 2 * kl:
        raise ConfigError(f"kl {kl:g} is finer than codes of 16 bits; the finest here is {found.mean():.1e}")
    return codec, found


def _mean_fisher(hidden: Tensor, head: Tensor, chunk: int) -> Tensor:
    """Mean over tokens of W^T (diag p - p p^T) W: fp64 [H, H]."""
    weight, total = head.float(), torch.zeros(head.shape[1], head.shape[1], dtype=torch.float64, device=head.device)
    for part in hidden.float().split(chunk):
        p = torch.softmax(part @ weight.T, -1)
        centre = p @ weight
        total += ((weight * p.sum(0)[:, None]).T @ weight).double() - (centre.T @ centre).double()
    return total / len(hidden)


def token_kl(hidden: Tensor, other: Tensor, head: Tensor, chunk: int = 128) -> Tensor:
    """KL(p(hidden) || p(other)) of every token, p the soft-max of the head: [N, H] twice -> fp32 [N]."""
    weight, found = head.float(), []
    for ours, theirs in zip(hidden.float().split(chunk), other.float().split(chunk)):
        # sums in fp64: fp32 would round away what is below 1e-7
        log_p, log_q = (torch.log_softmax((x @ weight.T).double(), -1) for x in (ours, theirs))
        found.append((log_p.exp() * (log_p - log_q)).sum(-1).float())
    return torch.cat(found)
