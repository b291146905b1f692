"""A rank that cuts its tokens into parts of its own: equal to one pass over them, alone and amid other ranks."""

import pytest
import torch
from torch import Tensor

from megatron_hylo.kernels.gated_delta_rule import gated_delta_rule
from megatron_hylo.models.kernel_cases import _Middle, _middle_part
from megatron_hylo.parallel import recurrence
from tests.kernels import test_gated_delta_rule
from tests.kernels.compare import relative_error


class Alone:
    """A context group of one rank."""

    rank = 0

    def gather_affine_maps(self, transition: Tensor, increment: Tensor, backward: bool = False) -> list[tuple[Tensor, Tensor]]:
        """The maps of one rank: its own."""
        return [(transition, increment)]


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    return list(torch.autograd.grad(out, inputs, upstream))


@pytest.mark.parametrize("amid_others", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_parts_equal_one_pass(parts: int, amid_others: bool, monkeypatch) -> None:
    monkeypatch.setattr(recurrence, "own_parts", lambda value: parts)
    *inputs, _ = test_gated_delta_rule.inputs(90)
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = recurrence.delta_rule_over_ranks(_Middle() if amid_others else Alone(), *inputs)
    if amid_others:
        truth = _middle_part(gated_delta_rule, **dict(zip(("q", "k", "v", "g", "beta"), inputs)))
    else:
        truth, _ = gated_delta_rule(*inputs)
    pairs = [(out, truth), *zip(gradients(out, inputs), gradients(truth, inputs))]
    assert max(relative_error(ours, theirs) for ours, theirs in pairs) < 1e-9


def test_parts_fill_a_gpu_with_long_sequences(monkeypatch) -> None:
    class OnGpu:
        is_cuda, device = True, torch.device("cuda")

        def __init__(self, *shape: int) -> None:
            self.shape = shape

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("P", (), {"multi_processor_count": 132}))
    assert recurrence.own_parts(torch.zeros(1, 65536, 6, 1)) == 1  # on a CPU
    assert recurrence.own_parts(OnGpu(1, 65536, 6, 512)) == 8  # 48 programs
    assert recurrence.own_parts(OnGpu(1, 65536, 9, 512)) == 4  # 72
    assert recurrence.own_parts(OnGpu(1, 16384, 6, 512)) == 2
    assert recurrence.own_parts(OnGpu(1, 16383, 6, 512)) == 1
    assert recurrence.own_parts(OnGpu(8, 2048, 9, 64)) == 1
