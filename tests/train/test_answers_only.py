"""A loss on answers alone against plain torch on the tokens that count."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from megatron_hylo.data.packed import IGNORED
from megatron_hylo.models.checkpoint import load_model
from megatron_hylo.train.setup import build_run
from tests.conftest import gradients
from tests.train.runs import relative_difference


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("stage", ["pretrain", "distil"])
def test_the_loss_is_plain_torchs_on_the_tokens_that_count(settings, one_rank, stage, graphs):
    """Cross-entropy and KL are means over the unmasked tokens of all micro-batches, one of which has none; so they are in the
    fixed shapes that a CUDA graph captures."""
    weight = 0.3 if stage == "distil" else 0.0
    fields = dict(micro_batch_size=1, sequence_length=48, distil=dict(ce_weight=weight), cuda_graphs=graphs)
    run = build_run(settings(stage, **fields), one_rank)
    (chunks,), (state,) = run.students, run.states
    batches = list(itertools.islice(run.batches(), run.micro_batches))
    generator = torch.Generator().manual_seed(0)
    for number, batch in enumerate(batches):
        batch["loss_mask"] = (torch.rand(batch["labels"].shape, generator=generator) < 0.3) & (number != 1)
        batch["labels"][~batch["loss_mask"]] = IGNORED
    for wrapper in state.wrapped:
        wrapper.zero_grad_buffer()
    metrics = run.objective.forward_backward(run.states, iter(batches), run.micro_batches)
    mine = {name: p.main_grad.clone() for name, p in chunks[0].named_parameters()}

    models = [load_model(path).train() for path in (run.config.model, run.config.teacher) if path]
    kept = torch.cat([batch["loss_mask"].flatten() for batch in batches])
    labels = torch.cat([batch["labels"].flatten() for batch in batches])[kept]
    ours, *theirs = (
        torch.cat([model.logits(model(batch["input_ids"])).flatten(0, 1) for batch in batches])[kept] for model in models
    )
    truth = {"cross_entropy": F.cross_entropy(ours, labels)}
    truth["loss"] = truth["cross_entropy"]
    if theirs:
        log_q = theirs[0].detach().log_softmax(-1)
        truth["kl"] = F.kl_div(ours.log_softmax(-1), log_q, log_target=True, reduction="batchmean")
        truth["loss"] = truth["kl"] + weight * truth["cross_entropy"]
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {name: float(value) for name, value in truth.items()}, rel=1e-6, abs=1e-7
    )
    truth["loss"].backward()
    difference, name = relative_difference(mine, gradients(models[0]))
    assert difference < 1e-5, name
