"""The chunked head loss against plain float64 torch: values, gradients, memory, refusals."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_hylo.config import ConfigError, from_dict
from megatron_hylo.config.train import KLSettings, TrainConfig
from megatron_hylo.distill import head_loss
from megatron_hylo.distill.head_loss import linear_head_loss, mean_counts, model_head_loss
from megatron_hylo.distill.plain_head_softmax import token_losses
from tests.conftest import uneven_model
from tests.forked import run_ranks
from tests.kernels.compare import relative_error

N, VOCAB, WIDTH, TEACHER_WIDTH = 53, 97, 24, 40
ROOT = Path(__file__).parents[2]


def make_inputs(dtype: torch.dtype = torch.float32, n: int = N, vocab: int = VOCAB) -> dict[str, Tensor]:
    """Logits of a spread of about 3; student and teacher of different width."""
    return {
        "hidden": torch.randn(n, WIDTH).to(dtype).requires_grad_(),
        "weight": (torch.randn(vocab, WIDTH) * 3 * WIDTH**-0.5).to(dtype).requires_grad_(),
        "labels": torch.randint(vocab, (n,)),
        "teacher_hidden": torch.randn(n, TEACHER_WIDTH).to(dtype),
        "teacher_weight": (torch.randn(vocab, TEACHER_WIDTH) * 3 * TEACHER_WIDTH**-0.5).to(dtype),
    }


def reference(
    inputs: dict[str, Tensor], kl_weight: float, ce_weight: float, direction: str = "forward", temperature: float = 1.0,
    top_k: int | None = None, mask: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The module's formula with whole logits in float64, on the very values of `inputs`."""
    hidden, weight = (inputs[name].detach().double().requires_grad_() for name in ("hidden", "weight"))
    share = torch.ones(len(hidden)).double() if mask is None else mask.double()
    share = share / share.sum()
    log_p = F.log_softmax(hidden @ weight.T / temperature, -1)
    log_q = F.log_softmax(inputs["teacher_hidden"].double() @ inputs["teacher_weight"].double().T / temperature, -1)
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double() @ share
    if top_k is not None and top_k < log_q.shape[1]:
        log_p, log_q = (classes(x, log_q.topk(top_k).indices) for x in (log_p, log_q))
    pair = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    kl = F.kl_div(*pair, reduction="none", log_target=True).sum(-1) @ share * temperature**2
    cross_entropy = F.cross_entropy(hidden @ weight.T, inputs["labels"], reduction="none") @ share
    loss = kl_weight * kl + ce_weight * cross_entropy
    gradients = torch.autograd.grad(loss, (hidden, weight))
    return {"loss": loss, "kl": kl, "cross_entropy": cross_entropy, "agreement": agreement,
            "hidden": gradients[0], "weight": gradients[1]}  # fmt: skip


def classes(log_p: Tensor, kept: Tensor) -> Tensor:
    """Log-probabilities of the tokens `kept` [n, k] and, last, of all others together: [n, k + 1]."""
    others = log_p.scatter(1, kept, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(1, kept), others], -1)


def errors(
    inputs: dict[str, Tensor], kl_weight: float, ce_weight: float, chunk: int, drop: tuple[str, ...] = (),
    direction: str = "forward", temperature: float = 1.0, top_k: int | None = None, mask: Tensor | None = None,
    capacity: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """Relative errors of everything the loss returns and of both gradients; `drop` names arguments left out."""
    given = {name: value for name, value in inputs.items() if name not in drop}
    measure = "teacher_weight" in given
    result = linear_head_loss(
        **given,
        chunk_tokens=chunk,
        token_mask=mask,
        capacity=capacity,
        settings=KLSettings(
            kl_weight=kl_weight, ce_weight=ce_weight, kl_direction=direction, kl_temperature=temperature, kl_top_k=top_k
        ),
    )
    weights = (kl_weight, ce_weight) if measure else (0.0, 1.0)
    truth = reference(inputs, *weights, direction, temperature, top_k, mask)
    found = {}
    for name in ("loss", "kl", "cross_entropy"):
        value = getattr(result, name)
        missing = (name == "kl" and not measure) or (name == "cross_entropy" and "labels" in drop)
        assert (value is None) == missing, name
        if value is not None:
            found[name] = relative_error(value, truth[name])
    gradients = torch.autograd.grad(result.loss * 0.37, (given["hidden"], given["weight"]))
    for name, gradient in zip(("hidden", "weight"), gradients):
        assert gradient.dtype == inputs[name].dtype
        found[f"gradient of {name}"] = relative_error(gradient, 0.37 * truth[name])
    print({name: f"{value:.1e}" for name, value in found.items()})
    return found


CASES = {  # kl_weight, ce_weight, arguments left out
    "kl": (1.0, 0.0, ("labels",)),
    "kl, cross-entropy measured": (1.0, 0.0, ()),
    "kl, ce_weight ignored": (2.0, 0.0, ("labels",)),
    "mixed": (0.7, 0.4, ()),
    "cross-entropy": (1.0, 0.25, ("teacher_hidden", "teacher_weight")),  # the weights are ignored
    "cross-entropy beside a teacher": (0.0, 1.0, ()),
}


@pytest.mark.parametrize("chunk", [1, 7, 16, N, 1000])
@pytest.mark.parametrize("case", CASES)
def test_equals_float64_torch(case, chunk):
    kl_weight, ce_weight, drop = CASES[case]
    found = errors(make_inputs(), kl_weight, ce_weight, chunk, drop)
    assert max(found.values()) < 2e-6, found


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("case", ["kl", "mixed"])
def test_directions_and_temperatures_equal_float64_torch(case, direction, temperature):
    kl_weight, ce_weight, drop = CASES[case]
    found = errors(make_inputs(), kl_weight, ce_weight, 7, drop, direction, temperature)
    assert max(found.values()) < 5e-6, found


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_masked_tokens_equal_float64_torch(case, dtype):
    kl_weight, ce_weight, drop = CASES[case]
    mask = torch.randint(2, (N,)).to(dtype)
    found = errors(make_inputs(), kl_weight, ce_weight, 7, drop, mask=mask)
    assert max(found.values()) < 2e-6, found


@pytest.mark.parametrize("capacity", [25, 30, N])
@pytest.mark.parametrize(("direction", "temperature", "top_k"), [("forward", 1, None), ("reverse", 2, None), ("forward", 1, 5)])
@pytest.mark.parametrize("drop", [(), ("teacher_hidden", "teacher_weight")])
def test_a_capacity_makes_shapes_that_no_mask_changes_and_equals_float64_torch(
    monkeypatch, capacity, direction, temperature, top_k, drop
):
    mask, rows = torch.randperm(N) < 25, []
    compute = head_loss._LinearHeadLoss.apply
    monkeypatch.setattr(head_loss._LinearHeadLoss, "apply", lambda hidden, *a: rows.append(len(hidden)) or compute(hidden, *a))
    found = errors(make_inputs(), 0.7, 0.4, 7, drop, direction, temperature, top_k, mask, capacity)
    assert max(found.values()) < 5e-6 and rows == [capacity]


@pytest.mark.parametrize("capacity", [None, N - 1, N])
def test_masked_tokens_may_hold_anything(capacity):
    inputs, mask = make_inputs(), torch.arange(N) % 4 > 0
    truth = reference(inputs, 0.7, 0.4, mask=mask)
    for name in ("hidden", "teacher_hidden"):
        inputs[name].data[~mask] = torch.nan
    inputs["labels"][~mask] = 10**6
    result = linear_head_loss(
        **inputs, chunk_tokens=7, token_mask=mask, settings=KLSettings(kl_weight=0.7, ce_weight=0.4), capacity=capacity
    )
    result.loss.backward()
    assert relative_error(result.loss, truth["loss"]) < 2e-6
    assert inputs["hidden"].grad[~mask].count_nonzero() == 0
    assert max(relative_error(inputs[name].grad, truth[name]) for name in ("hidden", "weight")) < 2e-6


@pytest.mark.parametrize("capacity", [None, 4, N])
@pytest.mark.parametrize("top_k", [None, 5])
def test_all_tokens_masked(top_k, capacity):
    inputs = make_inputs()
    result = linear_head_loss(
        **inputs,
        token_mask=torch.zeros(N, dtype=torch.bool),
        capacity=capacity,
        settings=KLSettings(ce_weight=0.4, kl_top_k=top_k),
    )
    result.loss.backward()
    assert [result.loss.item(), result.kl.item(), result.cross_entropy.item()] == [0.0] * 3
    for name in ("hidden", "weight"):
        assert inputs[name].grad.shape == inputs[name].shape and inputs[name].grad.count_nonzero() == 0


def test_a_model_s_head_loss_is_that_of_its_flattened_tokens(one_rank):
    student, teacher = uneven_model("*-"), uneven_model("*-*-")
    ids, labels, mask = (torch.randint(high, (3, 10)) for high in (160, 160, 2))
    with torch.no_grad():
        hidden, taught = student(ids), teacher(ids)
    settings = KLSettings(ce_weight=0.4, kl_direction="reverse", kl_temperature=2.0, kl_top_k=5)
    ours = model_head_loss(student, hidden, labels, teacher, taught, settings, token_mask=mask)
    flat = [labels.T.flatten(), taught.flatten(0, 1), teacher.head_weight()]
    theirs = linear_head_loss(hidden.flatten(0, 1), student.head_weight(), *flat, settings, token_mask=mask.T.flatten())
    assert torch.equal(ours.loss, theirs.loss) and torch.equal(ours.kl, theirs.kl)


@pytest.mark.multirank
def test_a_vocabulary_split_over_two_ranks_equals_float64_torch(tmp_path):
    """Directions, temperatures, top k up to more than a rank has, masks; and ties, of which each rank has some."""
    output = run_ranks("tests.distill.head_loss_ranks", [], 2, tmp_path)
    cases = [line.split("CASE ")[1].split("|") for line in output.splitlines() if "CASE " in line]
    assert len(cases) == 2 * 2 * 6 * 2 + 3 + 3 * 3, output
    for name, worst in cases:
        assert float(worst) < 1e-12, (name, worst)


@pytest.mark.parametrize("labels", ["some", "none"])
def test_unlabelled_tokens_have_their_kl_and_do_not_count_for_cross_entropy(labels):
    inputs = make_inputs(torch.float64)
    hidden = inputs["hidden"]
    inputs["labels"][:: 3 if labels == "some" else 1] = -100
    result = linear_head_loss(**inputs, chunk_tokens=7, settings=KLSettings(kl_weight=0.7, ce_weight=0.4))
    log_p = F.log_softmax(hidden @ inputs["weight"].T, -1)
    log_q = F.log_softmax(inputs["teacher_hidden"] @ inputs["teacher_weight"].T, -1)
    nll = F.nll_loss(log_p, inputs["labels"], reduction="sum", ignore_index=-100)
    nll = nll / (inputs["labels"] >= 0).sum() if labels == "some" else 0 * nll  # of nothing 0, not NaN
    assert relative_error(result.cross_entropy, nll) < 1e-12
    loss = 0.7 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) + 0.4 * nll
    assert relative_error(result.loss, loss) < 1e-12
    mine, theirs = (torch.autograd.grad(value, hidden)[0] for value in (result.loss, loss))
    assert relative_error(mine, theirs) < 1e-12


@pytest.mark.parametrize("drop", [(), ("teacher_hidden", "teacher_weight")], ids=["kl", "cross-entropy"])
def test_the_mean_over_parts_of_a_batch_is_the_loss_of_all_of_it_in_float64_torch(drop, one_rank):
    """Parts have different numbers of labels, one of them none."""
    inputs, edges = make_inputs(torch.float64), [0, 20, 33, N]
    inputs["labels"][1:20:3], inputs["labels"][20:33] = -100, -100
    whole = linear_head_loss(**{k: v for k, v in inputs.items() if k not in drop}, settings=KLSettings(ce_weight=0.4))
    parts = [{k: v[a:b] if "weight" not in k else v for k, v in inputs.items()} for a, b in zip(edges, edges[1:])]
    counts = mean_counts([part["labels"] for part in parts], dist.group.WORLD)
    assert counts.tolist() == [N / 3, (N - 13 - 7) / 3]
    losses = [
        linear_head_loss(**{k: v for k, v in part.items() if k not in drop}, counts=counts, settings=KLSettings(ce_weight=0.4))
        for part in parts
    ]
    log_p = F.log_softmax(inputs["hidden"] @ inputs["weight"].T, -1)
    written_out = F.nll_loss(log_p, inputs["labels"], ignore_index=-100)
    assert relative_error(whole.cross_entropy, written_out) < 1e-12
    if not drop:
        log_q = F.log_softmax(inputs["teacher_hidden"] @ inputs["teacher_weight"].T, -1)
        written_out = 0.4 * written_out + F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    mean = sum(part.loss for part in losses) / 3
    names = [inputs["hidden"], inputs["weight"]]
    truth = torch.autograd.grad(written_out, names)
    for loss in (whole.loss, mean):
        assert relative_error(loss, written_out) < 1e-12
        found = torch.autograd.grad(loss, names)
        assert max(relative_error(ours, theirs) for ours, theirs in zip(found, truth)) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_float64_inputs_stay_float64(case):
    kl_weight, ce_weight, drop = CASES[case]
    found = errors(make_inputs(torch.float64), kl_weight, ce_weight, 7, drop)
    assert max(found.values()) < 1e-13, found


def test_gradient_is_the_slope_of_the_loss():
    """Central differences along random directions, in float64."""
    inputs = make_inputs(torch.float64)
    loss = linear_head_loss(**inputs, chunk_tokens=9, settings=KLSettings(kl_weight=0.7, ce_weight=0.4)).loss
    gradients = torch.autograd.grad(loss, (inputs["hidden"], inputs["weight"]))
    for name, gradient in zip(("hidden", "weight"), gradients):
        direction = torch.randn_like(gradient)
        ends = []
        for step in (1e-5, -1e-5):
            moved = inputs | {name: inputs[name].detach() + step * direction}
            ends.append(linear_head_loss(**moved, chunk_tokens=9, settings=KLSettings(kl_weight=0.7, ce_weight=0.4)).loss)
        slope = (ends[0] - ends[1]) / 2e-5
        assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-8)


@pytest.mark.parametrize("case", ["kl", "mixed", "cross-entropy"])
def test_bf16_inputs(case):
    kl_weight, ce_weight, drop = CASES[case]
    found = errors(make_inputs(torch.bfloat16, n=512, vocab=1000), kl_weight, ce_weight, 100, drop)
    assert found["loss"] < 1e-4, found
    assert max(found["gradient of hidden"], found["gradient of weight"]) < 1e-2, found


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_only_the_gradients_asked_for(frozen):
    inputs = make_inputs()
    truth = reference(inputs, 1.0, 0.0)
    for name in ("hidden", "weight"):
        inputs[name].requires_grad_(frozen not in (name, "both"))
    loss = linear_head_loss(**inputs, chunk_tokens=7).loss
    assert loss.requires_grad == (frozen != "both")
    assert relative_error(loss, truth["loss"]) < 2e-6
    if frozen != "both":
        loss.backward()
    for name in ("hidden", "weight"):
        assert (inputs[name].grad is None) == (frozen in (name, "both"))
        assert inputs[name].grad is None or relative_error(inputs[name].grad, truth[name]) < 2e-6


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if torch.is_tensor(t))])
        return out


def test_whole_logits_never_exist():
    n, vocab, chunk = 4096, 1024, 256
    inputs = make_inputs(n=n, vocab=vocab)
    with LargestTensor() as seen:
        linear_head_loss(**inputs, chunk_tokens=chunk, settings=KLSettings(kl_weight=1.0, ce_weight=0.5)).loss.backward()
    assert inputs["hidden"].grad is not None
    assert seen.numel == chunk * vocab  # and neither hidden [n, 40] nor head is larger
    with LargestTensor() as seen:
        (inputs["hidden"] @ inputs["weight"].T).logsumexp(-1).sum().backward()
    assert seen.numel == n * vocab  # the counter counts


def test_a_student_equal_to_its_teacher_has_no_loss():
    inputs = make_inputs()
    inputs |= {"teacher_hidden": inputs["hidden"].detach(), "teacher_weight": inputs["weight"].detach()}
    result = linear_head_loss(**inputs, chunk_tokens=10)
    result.loss.backward()
    assert abs(result.loss.item()) < 1e-7
    assert max(inputs[name].grad.abs().max().item() for name in ("hidden", "weight")) < 1e-8


def test_agreement_counts_tokens():
    """One-hot hidden states and heads: the most likely tokens are known."""
    weight = torch.eye(5)
    student, teacher = torch.eye(5)[[0, 1, 2, 3, 4, 0]], torch.eye(5)[[0, 1, 4, 3, 2, 1]]
    labels = torch.tensor([0, 1, 2, 0, -1, 0])
    cross_entropy, correct, kl, agreement = token_losses(student @ weight, teacher @ weight, labels, 0, None)
    assert agreement.tolist() == [1, 1, 0, 1, 0, 0] and correct.tolist() == [1, 1, 1, 0, 0, 1] and cross_entropy[4] == 0
    assert (kl > 0).tolist() == [False, False, True, False, True, True]
    assert linear_head_loss(student, weight, None, teacher, weight).cross_entropy is None


def test_refusals():
    inputs = make_inputs()
    with pytest.raises(ConfigError, match="needs a teacher or labels"):
        linear_head_loss(inputs["hidden"], inputs["weight"])
    for k in (0, -5):
        with pytest.raises(ConfigError, match=f"kl_top_k must be at least 1, got {k}; leave it out"):
            linear_head_loss(**inputs, settings=KLSettings(kl_top_k=k))
        with pytest.raises(ConfigError, match=f"kl_top_k must be at least 1, got {k}; leave it out"):
            from_dict(
                TrainConfig, dict(stage="distil", data="-", output="-", model="-", teacher="-", distil={"kl_top_k": k}), ""
            )
    with pytest.raises(IndexError):
        linear_head_loss(**inputs, token_mask=torch.ones(N - 1))
    inputs["teacher_weight"] = torch.cat([inputs["teacher_weight"], inputs["teacher_weight"][:3]])
    with pytest.raises(ConfigError, match=f"teacher's vocabulary has {VOCAB + 3} rows a rank, the student's {VOCAB}"):
        linear_head_loss(**inputs)
