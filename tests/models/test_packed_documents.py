"""Documents packed into one sequence against the same documents run one by one: hidden states, losses, gradients."""

import pytest
import torch
from torch import Tensor

from megatron_hylo.config.train import KLSettings
from megatron_hylo.data.packed import IGNORED
from megatron_hylo.distill.alignment import align_layers
from megatron_hylo.distill.head_loss import model_head_loss
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.parallel.documents import PackedDocuments
from tests.conftest import uneven_model
from tests.kernels.compare import relative_error

LENGTHS = [5, 1, 70, 2, 3, 66]  # shorter than a convolution, and longer than a chunk of the linear layers' kernels
TOLERANCE = 2e-6  # the norms are fp32 inside
PATTERNS = ["*-", "+-", "M-", "G-", "W-", "G-+-M-*-"]


@pytest.fixture
def text() -> tuple[Tensor, PackedDocuments]:
    """Token ids [1, all], and where the documents are."""
    ends = torch.tensor(LENGTHS).cumsum(0)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends[:-1]])
    return torch.randint(160, (1, int(ends[-1]))), PackedDocuments(starts, int(ends[-1]), slice(0, int(ends[-1])))


def gradients(model: HyloModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def worst(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert mine.keys() == theirs.keys() and mine
    return max(relative_error(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("changes", [{}, dict(qk_layernorm=True, add_qkv_bias=True)], ids=["plain", "normed"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_hidden_states_and_gradients(pattern, changes, one_rank, text):
    ids, documents = text
    model = uneven_model(pattern, **changes)
    packed = model(ids, documents)
    alone = torch.cat([model(part) for part in ids.split(LENGTHS, dim=1)])
    upstream = torch.randn_like(packed)
    assert relative_error(packed, alone) < TOLERANCE
    (packed * upstream).sum().backward()
    mine = gradients(model)
    (alone * upstream).sum().backward()
    assert worst(mine, gradients(model)) < TOLERANCE
    with torch.no_grad():
        assert relative_error(model(ids), alone) > 1e-2  # documents do change one another where nothing parts them


def test_losses_of_the_head(one_rank, text):
    """Cross-entropy and KL; the last token of each document has no label."""
    ids, documents = text
    student, teacher = uneven_model("G-+-M-"), uneven_model("*-*-*-")
    labels = ids.roll(-1, 1)
    labels[0, torch.cat([documents.starts[1:], torch.tensor([documents.length])]) - 1] = IGNORED

    def loss(ids: Tensor, labels: Tensor, documents: PackedDocuments | None, counts: Tensor | None = None):
        with torch.no_grad():
            taught = teacher(ids, documents)
        hidden = student(ids, documents)
        return model_head_loss(
            student, hidden, labels, teacher, taught, chunk_tokens=16, counts=counts, settings=KLSettings(ce_weight=0.7)
        )

    packed = loss(ids, labels, documents)
    packed.loss.backward()
    mine = gradients(student)
    counts = torch.tensor([documents.length, int((labels >= 0).sum())]).double()
    for part, part_labels in zip(ids.split(LENGTHS, dim=1), labels.split(LENGTHS, dim=1)):
        loss(part, part_labels, None, counts).loss.backward()
    assert worst(mine, gradients(student)) < TOLERANCE
    logits = student.logits(student(ids, documents))[0]
    written_out = torch.nn.functional.cross_entropy(logits, labels[0], ignore_index=IGNORED)
    assert packed.cross_entropy.item() == pytest.approx(written_out.item(), rel=1e-6)


@pytest.mark.parametrize("loss", ["ild", "sequential"])
def test_alignment(loss, one_rank, text):
    """Both losses are means over tokens, so the packed one is the mean of the documents', by length."""
    ids, documents = text
    student, teacher = uneven_model("G-+-M-"), uneven_model("*-*-*-")
    (packed,), _ = align_layers([student], teacher, ids, loss, gradient_scale=1.0, documents=documents)
    mine, total = gradients(student), 0.0
    for part in ids.split(LENGTHS, dim=1):
        share = part.shape[1] / documents.length
        (one,), _ = align_layers([student], teacher, part, loss, gradient_scale=share)
        total += share * one.loss.item()
    assert packed.loss.item() == pytest.approx(total, rel=1e-6)
    assert worst(mine, gradients(student)) < TOLERANCE


def test_windows_of_a_batch_are_documents_too(one_rank):
    model = uneven_model("G-+-M-*-")
    ids = torch.randint(160, (3, 20))
    documents = PackedDocuments(torch.tensor([0, 20, 40]), 60, slice(0, 60))
    with torch.no_grad():
        assert relative_error(model(ids.view(1, -1), documents), model(ids).transpose(0, 1).flatten(0, 1)[:, None]) < TOLERANCE


def test_what_a_rank_has_of_documents():
    documents = PackedDocuments(torch.tensor([0, 4, 5, 11]), 16, slice(6, 12))
    assert documents.positions.tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]
    assert documents.own_positions.tolist() == [1, 2, 3, 4, 5, 0]
    assert documents.reset_mask.tolist() == [False] * 5 + [True]
    assert documents.attention_ranges == [(slice(0, 5), slice(5, 11)), (slice(5, 6), slice(11, 12))]
