"""Gated DeltaNet whose tokens are cut into parts that are computed side by side, as on a GPU: equal to one pass over them."""

import pytest
import torch

from megatron_hylo.models import gdn
from megatron_hylo.parallel import recurrence
from megatron_hylo.parallel.documents import PackedDocuments
from tests.conftest import uneven_model


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("parts", [2, 3, 6])
def test_parts_equal_the_whole(parts, packed, one_rank, monkeypatch):
    model, ids = uneven_model("G-G-"), torch.randint(160, (1 if packed else 2, 66))
    documents = PackedDocuments(torch.tensor([0, 7, 22, 23]), 66, slice(0, 66)) if packed else None

    def run(n: int) -> dict[str, torch.Tensor]:
        cut, right = [], recurrence._InParts.apply
        with monkeypatch.context() as patch:
            patch.setattr(recurrence._InParts, "apply", lambda *a: cut.append(a[1]) or right(*a))
            patch.setattr(gdn, "parts_that_fill", lambda value: n)
            out = model(ids, documents)
        assert cut == ([] if n == 1 else [n, n])
        out.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return {"output": out.detach()} | gradients

    one, other = run(1), run(parts)
    assert one.keys() == other.keys() and any("in_proj" in name for name in one)
    worst = {name: float((other[name] - x).norm() / x.norm()) for name, x in one.items()}
    assert worst["output"] < 1e-12 and max(worst.values()) < 1e-6, worst  # norms are fp32


def test_parts_fill_a_gpu_with_long_sequences_alone(monkeypatch):
    class OnGpu:
        is_cuda, device = True, torch.device("cuda")

        def __init__(self, *shape):
            self.shape = shape

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("P", (), {"multi_processor_count": 132}))
    assert recurrence.parts_that_fill(torch.zeros(1, 65536, 6, 1)) == 1  # on a CPU
    assert recurrence.parts_that_fill(OnGpu(1, 65536, 6, 512)) == 2  # 48 programs
    assert recurrence.parts_that_fill(OnGpu(1, 65536, 2, 64)) == 8
    assert recurrence.parts_that_fill(OnGpu(1, 16384, 2, 64)) == 2
    assert recurrence.parts_that_fill(OnGpu(1, 16383, 2, 64)) == 1
    assert recurrence.parts_that_fill(OnGpu(8, 2048, 9, 64)) == 1
