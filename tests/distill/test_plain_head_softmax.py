"""The KL to the teacher's top k, with everything else as one class, against float64 autograd of the classes' KL."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from megatron_hylo.config.train import KLSettings
from megatron_hylo.distill.head_loss import linear_head_loss
from megatron_hylo.distill.plain_head_softmax import top_k_mask
from megatron_hylo.kernels.registry import in_use, override
from tests.distill.test_head_loss import CASES, VOCAB, N, classes, errors, make_inputs


@pytest.mark.parametrize("top_k", [1, 5, 50, VOCAB])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("case", ["kl", "mixed"])
def test_top_k_and_the_rest_as_one_class_equal_float64_torch(case, direction, temperature, top_k):
    kl_weight, ce_weight, drop = CASES[case]
    for (dtype, limit), mask in itertools.product(
        ((torch.float32, 5e-6), (torch.float64, 1e-13)), (None, torch.arange(N) % 3 > 0)
    ):
        found = errors(make_inputs(dtype), kl_weight, ce_weight, 7, drop, direction, temperature, top_k, mask)
        assert max(found.values()) < limit, (dtype, mask is not None, found)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_top_k_of_the_whole_vocabulary_is_the_full_kl(direction):
    inputs = make_inputs()
    full, whole, more, part = (
        linear_head_loss(**inputs, settings=KLSettings(kl_direction=direction, kl_top_k=k)).kl
        for k in (None, VOCAB, 10**6, VOCAB - 2)
    )
    assert torch.equal(full, whole) and torch.equal(full, more)
    assert part < full  # what classes say apart, they do not say together


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-4)])  # logits to 230, rounded
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_top_k_of_models_that_are_nearly_sure(direction, dtype, limit):
    """Half of the rests hold less than what 1 - P can tell from 0, in float64 too."""
    inputs = make_inputs(dtype)
    inputs["hidden"] = (16 * inputs["hidden"].detach()).requires_grad_()
    inputs |= {"teacher_hidden": 0.9 * inputs["hidden"].detach(), "teacher_weight": inputs["weight"].detach()}
    log_p = F.log_softmax(inputs["hidden"].double() @ inputs["weight"].double().T, -1)
    assert classes(log_p, log_p.topk(5).indices)[:, -1].median().exp() < torch.finfo(torch.float64).eps
    found = errors(inputs, 1.0, 0.0, 7, ("labels",), direction, top_k=5)
    assert max(found.values()) < limit, found


def test_top_k_takes_exactly_k_of_equal_logits():
    values = torch.tensor([[1.0, 3.0, 1.0, 1.0, 2.0, 1.0], [0.0] * 6])
    for k in range(1, 6):
        mask = top_k_mask(values, k, None)
        assert mask.sum(-1).tolist() == [k, k]
        assert values[0][mask[0]].sort(descending=True).values.tolist() == [3.0, 2.0, 1.0, 1.0, 1.0][:k]


def test_top_k_runs_in_plain_torch_and_says_so():
    inputs = make_inputs()
    linear_head_loss(**inputs, settings=KLSettings(kl_top_k=5))
    assert in_use()["head_softmax"] == "torch"
    with (
        override("head_softmax", "triton"),
        pytest.raises(RuntimeError, match="triton was asked for by an override, but .* no KL .* top k"),
    ):
        linear_head_loss(**inputs, settings=KLSettings(kl_top_k=5))
