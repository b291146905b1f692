"""Losses and gradients of a step's micro-batches against fp32 plain torch on the global batch as a whole."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megatron_hylo.config.recall import RecallSettings
from megatron_hylo.config.train import KLSettings
from megatron_hylo.models.checkpoint import load_model
from megatron_hylo.train.setup import build_run
from tests.conftest import gradients
from tests.train.runs import relative_difference


@pytest.mark.parametrize(
    "labels", ["some", "none", "recall", "recall without answers", "recall within", "recall all", "recall in fixed shapes"]
)
@pytest.mark.parametrize("stage", ["pretrain", "distil"])
def test_unequal_numbers_of_labels_make_the_loss_of_plain_torch_on_the_global_batch(settings, one_rank, stage, labels):
    """Four packed micro-batches; cross-entropy is a mean over all their labels, the KL over all their tokens.

    With recall, the answers' cross-entropy is added token by token; one micro-batch has no answer. Answers far from their fact
    can be left to that alone.
    """
    weight, within = 0.3 if stage == "distil" else 0.0, {"recall within": 40, "recall all": None}.get(labels, 0)
    recall = RecallSettings(0.8 if "recall" in labels else 0.0, answer_weight=2.5, kl_within=within)
    length = 192 if recall.share else 96
    config = settings(
        stage, packed_documents=True, micro_batch_size=1, sequence_length=length, distil=dict(ce_weight=weight), recall=recall
    )
    run = build_run(config, one_rank)
    config.cuda_graphs = labels == "recall in fixed shapes"  # with documents apart, which graphs themselves cannot capture
    (chunks,), (state,) = run.students, run.states
    batches = list(itertools.islice(run.batches(), 4))
    batches[2]["labels"][:, 5:60] = -100
    if labels == "none":
        for batch in batches:
            batch["labels"].fill_(-100)
    if recall.share:
        for batch in batches if labels == "recall without answers" else batches[1:2]:
            batch["answers"].zero_()
    counts = [int((batch["labels"] >= 0).sum()) for batch in batches]
    assert len(set(counts)) > 1 or labels == "none"
    for wrapper in state.wrapped:
        wrapper.zero_grad_buffer()
    metrics = run.objective.forward_backward(run.states, iter(batches), run.micro_batches)
    mine = {name: p.main_grad.clone() for name, p in chunks[0].named_parameters()}

    models = [load_model(path).train() for path in (config.model, config.teacher) if path]
    logits: list[list[torch.Tensor]] = [[] for _ in models]
    for batch in batches:
        edges = [*batch["documents"].starts.tolist(), batch["input_ids"].shape[1]]
        for start, stop in zip(edges, edges[1:]):
            for model, found in zip(models, logits):
                found.append(model.logits(model(batch["input_ids"][:, start:stop]))[0])
    ours, *theirs = (torch.cat(found) for found in logits)
    wanted = torch.cat([batch["labels"][0] for batch in batches])
    far = torch.zeros_like(wanted).bool()
    if recall.share and theirs and within is not None:
        far = torch.cat([batch["answers"][0] for batch in batches]) > within
        assert bool(far.any()) == (labels != "recall without answers")
    # of no labels torch's own mean is NaN
    cross_entropy = F.cross_entropy(ours[~far], wanted[~far]) if labels != "none" else 0 * ours.sum()
    truth = {"loss": cross_entropy, "cross_entropy": cross_entropy}
    if theirs:
        log_q = theirs[0].detach().log_softmax(-1)
        truth["kl"] = F.kl_div(ours[~far].log_softmax(-1), log_q[~far], log_target=True, reduction="batchmean")
        truth["loss"] = truth["kl"] + weight * cross_entropy
    if recall.share:
        answers = torch.cat([batch["answers"][0] for batch in batches]) * (wanted >= 0)
        assert bool(answers.any()) == (labels != "recall without answers")
        answer_sum = F.cross_entropy(ours[answers > 0], wanted[answers > 0], reduction="sum")
        truth["answer_cross_entropy"] = answer_sum / max(1, int((answers > 0).sum()))
        truth["loss"] = truth["loss"] + 2.5 * answer_sum / (int((~far).sum()) if theirs else sum(counts))
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {name: float(value) for name, value in truth.items()}, rel=1e-6
    )
    truth["loss"].backward()
    difference, name = relative_difference(mine, gradients(models[0]))
    print(stage, labels, counts, f"{difference:.1e}", name)
    assert difference < 1e-5, name


@pytest.mark.parametrize("form", ["packed", "in fixed shapes"])
@pytest.mark.parametrize(("stage", "within"), [("pretrain", 0), ("distil", 0), ("distil", None), ("distil", 40)])
def test_answers_that_alone_have_cross_entropy_equal_a_plain_loop_over_tokens(settings, one_rank, stage, within, form):
    """KL of all tokens but far answers, the text's cross-entropy without facts and questions, answers once more by weight.

    One of four micro-batches has few labels.
    """
    recall, packed = RecallSettings(0.6, answer_weight=2.5, kl_within=within, cross_entropy="answers"), form == "packed"
    config = settings(
        stage, packed_documents=packed, micro_batch_size=1, sequence_length=192, distil=dict(ce_weight=0.3), recall=recall
    )
    run = build_run(config, one_rank)
    config.cuda_graphs = not packed
    for wrapper in run.states[0].wrapped:
        wrapper.zero_grad_buffer()
    batches = list(itertools.islice(run.batches(), 4))
    batches[2]["labels"][:, 20:170] = -100
    metrics = run.objective.forward_backward(run.states, iter(batches), run.micro_batches)
    mine = {name: p.main_grad.clone() for name, p in run.students[0][0].named_parameters()}

    models = [load_model(path).train() for path in (config.model, config.teacher) if path]
    terms: dict[str, list[torch.Tensor]] = {"kl": [], "cross_entropy": [], "answers": []}
    for number, window in enumerate(run.dataset.window(i) for i in range(4)):
        tokens, starts = torch.from_numpy(window.tokens), window.document_starts.tolist() if packed else [0]
        edges = [*(start for start in starts if start < len(tokens) - 1), len(tokens) - 1]
        own, *theirs = (
            torch.cat([m.logits(m(tokens[None, start:stop]))[0] for start, stop in zip(edges, edges[1:])]).log_softmax(-1)
            for m in models
        )
        for at, (token, place, distance) in enumerate(zip(tokens[1:], window.source_places[1:], window.answers[1:])):
            is_answer = distance > 0 and at + 1 not in starts
            is_label = at + 1 not in starts and not (number == 2 and 20 <= at < 170)
            counts = not theirs or within is None or not is_answer or distance <= within
            if theirs and counts:
                wanted = theirs[0][at].detach()
                terms["kl"].append((wanted.exp() * (wanted - own[at])).sum())
            if is_label and counts and (place >= 0 or is_answer):
                terms["cross_entropy"].append(-own[at, token])
            if is_label and is_answer:
                terms["answers"].append(-own[at, token])
    means = {name: torch.stack(found).mean() for name, found in terms.items() if found}
    answers = 2.5 * torch.stack(terms["answers"]).sum() / len(terms["kl"] or terms["cross_entropy"])
    text = means["cross_entropy"]
    loss = answers + (means["kl"] + 0.3 * text if theirs else text)
    truth = means | {"loss": loss, "answer_cross_entropy": means.pop("answers")}
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {name: float(truth[name]) for name in metrics}, rel=1e-5
    )
    loss.backward()
    difference, name = relative_difference(mine, gradients(models[0]))
    assert difference < 1e-5, name


@pytest.mark.parametrize("stage", ["pretrain", "distil"])
def test_a_temperature_top_k_and_direction_leave_the_cross_entropy_alone(settings, one_rank, stage):
    """The reported mean over labels is the same whatever the KL is."""
    if stage == "pretrain":
        changes: list[dict] = [{}, {"loss_chunk_tokens": 5}]
    else:
        changes = [
            {},
            *({"distil": KLSettings(**one)} for one in ({"kl_temperature": 2.0}, {"kl_top_k": 7}, {"kl_direction": "reverse"})),
        ]
    found = []
    for change in changes:
        config = replace(settings(stage, packed_documents=True, micro_batch_size=1, sequence_length=96), **change)
        run = build_run(config, one_rank)
        metrics = run.objective.forward_backward(run.states, run.batches(), run.micro_batches)
        found.append(float(metrics["cross_entropy"]))
    assert found == pytest.approx(found[:1] * len(found), rel=1e-6)
