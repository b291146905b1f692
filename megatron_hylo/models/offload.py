"""Layer-wise CPU offload of a frozen model's weights.

While one mixer or MLP computes, the next one's weights are copied on a stream of their own into the other of two buffers;
norms, embedding and head stay. A copy of 8B weights takes a third of a second over PCIe, their forward pass of 65,536 tokens
three: by that count the copies cost no time with long sequences, and are the time with short ones.
"""

import torch
from torch import nn

from megatron_hylo.models.hylo_model import HyloModel

ALIGNMENT = 256  # bytes, of each tensor in a buffer


class OffloadedLayers:
    """Offload the weights of a model's mixers and MLPs to the CPU; each is prefetched for its own forward pass.

    Args:
        model: frozen, on its device; forward passes without gradients only.
    """

    def __init__(self, model: HyloModel) -> None:
        self.units = offloaded_units(model)
        device = next(model.parameters()).device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.places = [_places(unit) for unit in self.units]
        self.homes = [self._home(unit, places) for unit, places in zip(self.units, self.places)]
        size = max(home.numel() for home in self.homes)
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        if self.stream is not None:  # their memory may have been another tensor's a moment ago
            self.stream.wait_stream(torch.cuda.current_stream(device))
        self.holds: list[int | None] = [None, None]  # unit whose weights a buffer has
        self.copied: list[torch.cuda.Event | None] = [None, None]  # since when
        self.read: list[torch.cuda.Event | None] = [None, None]  # and since when nobody reads it any more
        for number, unit in enumerate(self.units):
            self._point(number, self.homes[number])
            unit.register_forward_pre_hook(lambda *_, number=number: self._arrive(number))
            unit.register_forward_hook(lambda *_, number=number: self._leave(number))

    def _home(self, unit: nn.Module, places: list[int]) -> torch.Tensor:
        home = torch.empty(places[-1], dtype=torch.uint8, pin_memory=self.stream is not None)
        for p, start in zip(unit.parameters(), places):
            home[start : start + p.numel() * p.element_size()] = p.detach().contiguous().view(-1).view(torch.uint8).cpu()
        return home

    def _point(self, number: int, where: torch.Tensor) -> None:
        for p, start in zip(self.units[number].parameters(), self.places[number]):
            p.data = where[start : start + p.numel() * p.element_size()].view(p.dtype).view(p.shape)

    def _copy(self, number: int) -> None:
        """Copy a unit's weights into its buffer, once the former content has been read."""
        half, home = number % 2, self.homes[number]
        if self.holds[half] == number:
            return
        self.holds[half] = number
        if self.stream is None:
            self.buffers[half][: len(home)] = home
            return
        if (read := self.read[half]) is not None:
            self.stream.wait_event(read)
        with torch.cuda.stream(self.stream):
            self.buffers[half][: len(home)].copy_(home, non_blocking=True)
            self.copied[half] = self.stream.record_event()

    def _arrive(self, number: int) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError("offloaded weights are gone when a backward pass needs them; use torch.no_grad()")
        self._copy(number)
        if self.stream is not None:
            copied = self.copied[number % 2]
            assert copied is not None  # by `_copy`, which records it
            torch.cuda.current_stream().wait_event(copied)
        self._point(number, self.buffers[number % 2])
        if number + 1 < len(self.units):
            self._copy(number + 1)

    def _leave(self, number: int) -> None:
        if self.stream is not None:
            self.read[number % 2] = torch.cuda.current_stream().record_event()
        self._point(number, self.homes[number])


def offloaded_units(model: HyloModel) -> list[nn.Module]:
    """Mixers and MLPs, in the order in which they compute."""
    return [unit for mixer, mlp in model.mixer_layers() for unit in (mixer.self_attention, mlp.mlp)]


def _places(unit: nn.Module) -> list[int]:
    """Offsets of the parameters in a buffer, and of its end, in bytes."""
    places = [0]
    for p in unit.parameters():
        places.append(-(-(places[-1] + p.numel() * p.element_size()) // ALIGNMENT) * ALIGNMENT)
    return places
