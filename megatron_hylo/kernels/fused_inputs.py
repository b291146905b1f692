"""Inputs as fused attention kernels want them: aligned in memory, of widths that the kernels take."""

import torch
import torch.nn.functional as F


def readable(x: torch.Tensor) -> torch.Tensor:
    """Copy x [..., channels] where it is not aligned to the 16 bytes that fused kernels read at a time.

    So it is with a section of odd width. Returns x itself where it is aligned and its channels are contiguous.
    """
    places = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1]))
    return x.contiguous() if x.stride(-1) != 1 or any(place % 16 for place in places) else x


def padded(*tensors: torch.Tensor, multiple: int = 8) -> tuple[torch.Tensor, ...]:
    """Pad heads with zero channels, as fused kernels want them; keep tensors that need none.

    Scores stay what they were, so their scale must be that of the heads before; outputs end with a zero for each channel that
    the values got.

    Args:
        tensors: queries, keys, values: [..., channels].
        multiple: number that the kernel wants the channels to be a multiple of.

    Returns:
        [..., channels rounded up] each.
    """
    return tuple(F.pad(x, (0, -x.shape[-1] % multiple)) if x.shape[-1] % multiple else x for x in tensors)


def same_width(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Pad tensors [..., channels] with zeros to the widest: flash kernels want queries, keys and values equally wide.

    Scores stay what they were; outputs end with a zero for each channel that the values got.
    """
    width = max(x.shape[-1] for x in tensors)
    return tuple(F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in tensors)
