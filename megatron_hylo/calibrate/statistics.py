"""Calibration folders: second moments of each attention layer of a teacher on some text, and that text.

DIR/calibration.json           {"format", "version", "teacher": content identity, "tokens", "sequence_length", "layers"}
DIR/windows.safetensors        calibration and held-out windows, int32 [n, sequence_length + 1]
DIR/layer_00000.safetensors    one layer's statistics
DIR/tokenizer/                 of the text
DIR/manifest.json              sizes and sha256 of all files

A layer's statistics, fp32, means over all tokens (q and k as the scores see them: bias and norm applied, not rotated):

    layer, tokens               []            which layer, how many tokens
    input_mean                  [d]           E[x], x the input of the mixer (normed)
    input_second_moment         [d, d]        E[x x^T]; those of W x follow from it
    query_second_moment         [Hq, dh, dh]  E[q q^T]
    key_second_moment           [Hkv, dh, dh] E[k k^T]
    output_energy               []            E|a|^2, a the mixer's output

and, where attention probabilities p are looked at, LOOK_BACK_TOKENS queries at a time (of all tokens: what is predicted from x
by least squares needs the same tokens in E[x x^T] as in E[n x]; of a part of them it made hybrids three times worse):

    head_energy                 [Hq]          E|o|^2 of each head's attention output, before W_O
    attention_distance          [Hq]          mean distance in tokens that a head looks back, the window's first token left out
    attention_entropy           [Hq]          mean entropy of a head's attention, nats; not in folders of earlier versions
    sink_mass                   [Hq]          mean attention on the window's first token
    length_moment               [Hq, d]       E[n x], n = |o| / E|o|: how long a head's output is, to be predicted from x
    reception_moment            [Hq, d]       E[(r - E r) x], r = log of the attention that a token receives from the next
                                              RECEPTION_TOKENS queries, each query's attention on its last as many being 1
"""

from pathlib import Path
from typing import Mapping

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_hylo.calibrate.description import read_calibration
from megatron_hylo.config import ConfigError
from megatron_hylo.io import verify_manifest
from megatron_hylo.io.identity import is_made_of
from megatron_hylo.platform.distributed import device

LOOK_BACK_TOKENS, RECEPTION_TOKENS = 512, 32
TOKENS_PER_CHANNEL = 4  # fewer tokens than this times the hidden size leave second moments mostly noise


def save_whole(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a .safetensors file beside its place and rename it: it is there as a whole or not at all.

    Args:
        tensors: of any shapes and dtypes; copied where not contiguous.
        file: its place, in a folder that exists.

    Raises:
        OSError: the disk is full, say.
    """
    beside = file.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside)
    beside.rename(file)


def layer_file(layer: int) -> str:
    """File name of one layer's statistics."""
    return f"layer_{layer:05d}.safetensors"


class CalibrationFolder(Mapping[int, dict[str, Tensor]]):
    """A calibration folder: statistics by layer, read one layer at a time.

    Args:
        path: made by `hylo calibrate`.
        teacher: model folder it must belong to.
        device: where tensors are wanted.

    Raises:
        ConfigError: not a calibration folder, or one of another checkpoint.
        DamagedError: its files are not what its manifest says.
    """

    def __init__(self, path: str | Path, teacher: str | Path, device: torch.device | str = "cpu") -> None:
        self.path, self.device = Path(path), device
        self.description = read_calibration(path)
        verify_manifest(self.path)
        if not is_made_of(self.description["teacher"], teacher):
            raise ConfigError(f"{path} was made with another checkpoint than {teacher}; run `hylo calibrate` with that one")

    def __getitem__(self, layer: int) -> dict[str, Tensor]:
        if not 0 <= layer < len(self):
            raise KeyError(layer)
        return load_file(self.path / layer_file(layer), device=str(self.device))

    def __iter__(self):
        return iter(range(len(self)))

    def __len__(self) -> int:
        return self.description["layers"]

    def windows(self) -> tuple[Tensor, Tensor]:
        """Read the calibration and held-out windows, int64 [n, sequence_length + 1] each."""
        stored = load_file(self.path / "windows.safetensors")
        return stored["calibration"].long(), stored["heldout"].long()


def check_statistics(statistics: Mapping[str, Tensor]) -> None:
    """Refuse statistics that an initialiser could only turn into a bad layer.

    Args:
        statistics: of one layer, as the module's description lists them.

    Raises:
        ConfigError: NaN or infinite activations, too few tokens, a singular covariance, a head that never fires.
    """
    layer, tokens = int(statistics["layer"]), int(statistics["tokens"])
    for name, tensor in statistics.items():
        if not tensor.isfinite().all():
            raise ConfigError(
                f"layer {layer}: {name} is not finite, so the teacher's activations are NaN or infinite there; "
                f"check the checkpoint with `hylo verify`, or calibrate in fp32"
            )
    moment = statistics["input_second_moment"].to(device(), torch.float64)
    needed = TOKENS_PER_CHANNEL * len(moment)
    if tokens < needed:
        raise ConfigError(
            f"layer {layer}: {tokens} calibration tokens are too few for {len(moment)} channels; give at least {needed}"
        )
    used = moment.diagonal() > 0  # a channel that its norm's weight switches off is no fault of the text
    if (rank := _rank(moment[used][:, used])) < (channels := int(used.sum())):
        raise ConfigError(
            f"layer {layer}: the covariance of its inputs is singular, rank {rank} of {channels}; the text is too uniform: "
            f"give more and more varied text"
        )
    for name in ("query_second_moment", "key_second_moment", "head_energy"):
        energy = statistics[name].double()
        energy = energy.diagonal(dim1=1, dim2=2).sum(1) if energy.dim() == 3 else energy
        silent = (energy <= 1e-10 * energy.mean()).nonzero().flatten().tolist()
        if silent or not energy.any():
            raise ConfigError(
                f"layer {layer}: head {silent[0] if silent else 0} never fires on this text (its {name} is zero); give more "
                f"varied text, or keep that layer attention `*`"
            )


def _rank(moment: Tensor) -> int:
    """Number of eigenvalues above 1e-9 of their mean, [n, n]; a Cholesky factor, far less work, exists where all are."""
    least = 1e-9 * moment.diagonal().mean()
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    if not torch.linalg.cholesky_ex(moment - least * identity).info:
        return len(moment)
    return int((torch.linalg.eigvalsh(moment) > least).sum())
