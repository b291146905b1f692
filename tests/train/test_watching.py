"""Losses by position and recall by distance against plain torch, and where a run records and reports them."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.config.recall import RecallSettings
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.data.preprocess import build_dataset
from megatron_hylo.eval.buckets import Buckets
from megatron_hylo.eval.perplexity import HeldoutText, Quality, evaluate, evaluate_recall
from megatron_hylo.eval.run_report import write_run_report
from megatron_hylo.models.checkpoint import load_model
from megatron_hylo.train.heldout import open_heldout
from megatron_hylo.train.loop import train
from megatron_hylo.train.positions import PositionLosses
from tests.conftest import uneven_model
from tests.data.conftest import make_documents

EDGES = [0, 4, 8, 16, 32, 64]
STARTS = ([0, 3, 19], [0, 40], [0], [0, 7, 8])  # the second begins with the last label of its window


@pytest.fixture(scope="module")
def models(one_rank):
    torch.manual_seed(0)
    return [uneven_model("*-G-").eval(), uneven_model("*-*-").eval()]


@pytest.fixture
def text() -> HeldoutText:
    windows = torch.randint(160, (4, 41), generator=torch.Generator().manual_seed(1))
    answers = torch.zeros(4, 41, dtype=torch.int32)
    for row, place, distance in ((0, 3, 2), (0, 20, 1), (0, 30, 9), (1, 40, 33), (2, 12, 8), (3, 40, 40)):
        answers[row, place] = distance
    return HeldoutText(windows, answers=answers)


def plain(models, text: HeldoutText) -> dict[str, Tensor]:
    """Every token by itself, each document through the model alone: labels, positions, answers, log soft-maxes."""
    found: dict[str, list[Tensor]] = {name: [] for name in ("label", "position", "answer", "student", "teacher")}
    for row, window in enumerate(text.windows):
        starts = text.document_starts[row].tolist() if text.document_starts is not None else [0]
        for start, stop in zip(starts, [*starts[1:], 41]):
            inputs = window[None, start : min(stop, 40)]
            if not inputs.numel():
                continue
            labels, answers = window[start + 1 : stop + 1].clone(), text.answers[row, start + 1 : stop + 1].clone()
            if stop <= 40:
                labels[-1], answers[-1] = -100, 0
            found["label"].append(labels)
            found["answer"].append(answers)
            found["position"].append(torch.arange(inputs.shape[1]))
            for name, model in zip(("student", "teacher"), models):
                with torch.no_grad():
                    found[name].append(model.logits(model(inputs))[0].log_softmax(-1))
    return {name: torch.cat(parts) for name, parts in found.items()}


def means(name: str, values: Tensor, places: Tensor, counted: Tensor) -> dict[str, float]:
    """Means of the counted values in each bucket that has one."""
    found = {}
    for low, high in zip(EDGES, EDGES[1:]):
        chosen = counted & (places >= low) & (places < high)
        if chosen.any():
            found[f"{name}_{low}-{high}"] = values[chosen].mean().item()
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_losses_by_position_equal_plain_torch_document_by_document(models, text, packed):
    if packed:
        text = replace(text, document_starts=[torch.tensor(starts) for starts in STARTS])
    truth, (student, teacher) = plain(models, text), models
    quality = evaluate(student, text, teacher, batch_size=3, chunk_tokens=17, first_bucket=4)
    labelled, places = truth["label"] >= 0, truth["position"]
    cross_entropy = F.nll_loss(truth["student"], truth["label"], reduction="none")
    kl = F.kl_div(truth["student"], truth["teacher"], log_target=True, reduction="none").sum(-1)
    expected = means("cross_entropy", cross_entropy, places, labelled) | means("kl", kl, places, torch.ones_like(labelled))
    assert quality.by_position == pytest.approx(expected, rel=1e-9)
    assert quality.tokens == labelled.sum() and quality.kl == pytest.approx(kl.mean().item(), rel=1e-9)
    assert quality.cross_entropy == pytest.approx(cross_entropy[labelled].mean().item(), rel=1e-9)
    agreeing = truth["student"].argmax(-1) == truth["teacher"].argmax(-1)
    assert quality.agreement == pytest.approx(agreeing.double().mean().item())
    assert Quality.from_dict(json.loads(json.dumps(quality.to_dict()))) == quality


@pytest.mark.parametrize("stride", [1, 4])
def test_losses_by_position_of_a_training_step_are_those_of_an_evaluation(models, text, stride):
    """Two micro-batches of two windows; of a sample they are those of its positions."""
    student, teacher = models
    config = TrainConfig("distil", "-", "-", model="-", teacher="-", sequence_length=40, precision="fp32")
    found = PositionLosses(config, 2, text.windows.device, first_bucket=4, sample=160 // stride)
    for rows in (text.windows[:2], text.windows[2:]):
        ids, labels = rows[:, :-1], rows[:, 1:]
        found.add(student, student(ids), {"labels": labels}, teacher, teacher(ids))
    truth = plain(models, text)
    sampled = truth["position"] % stride == 0
    kl = F.kl_div(truth["student"], truth["teacher"], log_target=True, reduction="none").sum(-1)
    cross_entropy = F.nll_loss(truth["student"], truth["label"], reduction="none")
    expected = means("cross_entropy", cross_entropy, truth["position"], sampled) | means("kl", kl, truth["position"], sampled)
    assert found.means() == pytest.approx({f"by_position/{name}": value for name, value in expected.items()}, rel=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_recall_by_distance_equals_plain_torch(models, text, packed):
    """Two of the answers are made what the model says, so that accuracies are between 0 and 1."""
    if packed:
        text = replace(text, document_starts=[torch.tensor(starts) for starts in STARTS])
    right = plain(models, text)["student"].argmax(-1)
    text.windows[0, 30], text.windows[3, 40] = right[29], right[159]
    truth = plain(models, text)
    counted, distances = (truth["answer"] > 0) & (truth["label"] >= 0), truth["answer"]
    cross_entropy = F.nll_loss(truth["student"], truth["label"], reduction="none")
    correct = (truth["student"].argmax(-1) == truth["label"]).double()
    expected = {"cross_entropy": cross_entropy[counted].mean().item(), "accuracy": correct[counted].mean().item()}
    for name, values in (("cross_entropy", cross_entropy), ("accuracy", correct)):
        expected |= {f"by_distance/{key}": value for key, value in means(name, values, distances, counted).items()}
    found = evaluate_recall(models[0], text, batch_size=3, chunk_tokens=17, first_bucket=4)
    tokens = {name: found.pop(name) for name in list(found) if "tokens" in name}
    assert tokens["tokens"] == counted.sum() == sum(tokens.values()) / 2
    assert found == pytest.approx(expected, rel=1e-9)
    assert 0 < found["accuracy"] < 1
    assert counted.sum() == (4 if packed else 6)  # two are the first tokens of a document


def test_buckets_double_from_the_first_on():
    names = {length: Buckets(length, 1024, 1, torch.device("cpu")).names for length in (16, 1024, 1025, 8192)}
    assert names[16] == names[1024] == ["0-1K"] and names[1025] == ["0-1K", "1K-2K"]
    assert names[8192] == ["0-1K", "1K-2K", "2K-4K", "4K-8K"]
    assert Buckets(257, 128, 1, torch.device("cpu")).names == ["0-128", "128-256", "256-512"]


def test_a_run_records_and_reports_them(settings, material, tmp_path, tokenizer):
    """Another text and recall at each evaluation, norms at logged steps; the report draws the buckets."""
    build_dataset(make_documents(30), tokenizer, tmp_path / "other", heldout_fraction=0.2)
    config = settings(
        "pretrain", steps=48, sequence_length=256, recall=RecallSettings(0.5), packed_documents=True, eval_interval=1,
        eval_data=[str(tmp_path / "other")], logging=dict(log_interval=5),
    )  # fmt: skip
    quality = train(config)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    def steps(name: str) -> list[int]:
        return [record["step"] for record in records if name in record]

    for name in ("heldout_perplexity", "heldout_perplexity/other", "heldout_by_position/cross_entropy_0-1K",
                 "heldout_by_position/cross_entropy_0-1K/other", "heldout_recall_accuracy"):  # fmt: skip
        assert steps(name) == [1, 2, 3], name
    assert steps("gradient_norm/gated_deltanet") == steps("loss") == [1, 3]
    for record in records:  # all tokens are in one bucket, and few enough to be measured all
        if "loss" in record:
            assert record["by_position/cross_entropy_0-1K"] == pytest.approx(record["cross_entropy"], rel=1e-5)
    assert any(name.startswith("heldout_recall_by_distance/cross_entropy_") for record in records for name in record)
    model, heldout = load_model(tmp_path / "run" / "model"), open_heldout(config)
    again = evaluate(model, heldout.texts[0])
    assert again.perplexity == pytest.approx(quality.perplexity, rel=1e-5)
    assert again.by_position == pytest.approx(quality.by_position, rel=1e-5)
    last = [record for record in records if "heldout_perplexity/other" in record][-1]
    assert evaluate(model, heldout.texts[1]).perplexity == pytest.approx(last["heldout_perplexity/other"], rel=1e-5)
    page = write_run_report([tmp_path / "run"]).read_text()
    for title in (
        "Cross-entropy of held-out recall answers",
        "Accuracy of held-out recall answers",
    ):  # positions are in one bucket
        assert title in page
    with pytest.raises(ConfigError, match="no dataset"):
        open_heldout(replace(config, eval_data=[str(tmp_path / "nowhere")]))
