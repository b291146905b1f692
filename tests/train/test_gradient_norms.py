"""Gradient norms by kind of layer against plain torch; tests/parity compares them over ranks."""

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_hylo.models.checkpoint import load_model
from megatron_hylo.train.gradient_norms import gradient_norms
from megatron_hylo.train.setup import build_run


@pytest.mark.parametrize("distributed", [True, False])
def test_gradient_norms_by_kind_equal_plain_torch(settings, one_rank, distributed):
    """All kinds of the model, and together the norm that Megatron-Core clips by."""
    config = settings(optimizer=dict(lr=1e-3, use_distributed_optimizer=distributed))
    run = build_run(config, one_rank)
    (state,) = run.states
    for wrapper in state.wrapped:
        wrapper.zero_grad_buffer()
    batches = [next(run.batches())]
    run.objective.forward_backward(run.states, iter(batches), 1)
    found = {kind: float(norm) for kind, norm in gradient_norms(state).items()}
    assert math.hypot(*found.values()) == pytest.approx(float(state.update()), rel=1e-6)

    student, teacher = (load_model(path) for path in (config.model, config.teacher))
    ids = batches[0]["input_ids"]
    with torch.no_grad():
        log_q = teacher.logits(teacher(ids)).log_softmax(-1)
    F.kl_div(student.logits(student(ids)).log_softmax(-1).flatten(0, 1), log_q.flatten(0, 1), log_target=True,
             reduction="batchmean").backward()  # fmt: skip
    squares: dict[str, float] = {}
    for name, p in student.named_parameters():
        kind = "embeddings"
        if name.startswith("decoder.layers."):
            layer = int(name.split(".")[2])
            kind = "mlp" if layer % 2 else ("gated_deltanet", "mla", "mamba2", "attention")[layer // 2]
        squares[kind] = squares.get(kind, 0.0) + float(p.grad.square().sum())
    assert found == pytest.approx({kind: math.sqrt(total) for kind, total in squares.items()}, rel=1e-5)
