"""Two ranks, half a vocabulary each: the head loss against whole logits in float64.

Started by test_head_loss.py. Prints one line a case: its name and the largest relative error of values and gradients.
"""

import itertools
from types import SimpleNamespace

import torch
import torch.distributed as dist

from megatron_hylo.config.train import KLSettings
from megatron_hylo.distill.head_loss import linear_head_loss
from megatron_hylo.distill.head_rows import head_part, teacher_rows, whole_head
from megatron_hylo.distill.plain_head_softmax import token_losses, top_k_mask
from tests.distill.test_head_loss import N, make_inputs, reference
from tests.kernels.compare import relative_error

VOCABULARY = 98
CASES = itertools.product(
    ("forward", "reverse"), (1.0, 2.0), (None, 1, 5, 50, VOCABULARY - 1, VOCABULARY),
    ((False, (1.0, 0.0)), (True, (0.7, 0.4))),
)  # fmt: skip


def worst_error(direction: str, temperature: float, top_k: int | None, masked: bool, weights: tuple[float, float]) -> float:
    """Errors of this rank's values and of its part of the gradients."""
    torch.manual_seed(0)
    inputs, group = make_inputs(torch.float64, vocab=VOCABULARY), dist.group.WORLD
    mask = torch.randint(2, (N,)) if masked else None
    truth = reference(inputs, *weights, direction, temperature, top_k, mask)
    mine = slice(group.rank() * VOCABULARY // 2, (group.rank() + 1) * VOCABULARY // 2)
    for name in ("weight", "teacher_weight"):
        inputs[name] = inputs[name].detach()[mine].requires_grad_(name == "weight")
    result = linear_head_loss(
        **inputs,
        chunk_tokens=20,
        group=group,
        token_mask=mask,
        settings=KLSettings(
            kl_weight=weights[0], ce_weight=weights[1], kl_direction=direction, kl_temperature=temperature, kl_top_k=top_k
        ),
    )
    result.loss.backward()
    dist.all_reduce(inputs["hidden"].grad)
    pairs = [(getattr(result, name), truth[name]) for name in ("loss", "kl", "cross_entropy")]
    pairs += [(inputs["hidden"].grad, truth["hidden"]), (inputs["weight"].grad, truth["weight"][mine])]
    return max(relative_error(ours, theirs) for ours, theirs in pairs)


def padded_error(student_size: int, teacher_size: int) -> float:
    """The same for heads padded to different sizes: rows that one of them lacks are in no soft-max and get no gradient."""
    torch.manual_seed(0)
    group, common = dist.group.WORLD, min(student_size, teacher_size)
    inputs = make_inputs(torch.float64, vocab=max(student_size, teacher_size))
    inputs["labels"] %= common
    shared = inputs | {name: inputs[name].detach()[:common] for name in ("weight", "teacher_weight")}
    truth = reference(shared, 0.7, 0.4)
    sizes = {"weight": student_size, "teacher_weight": teacher_size}
    mine = {name: inputs[name].detach()[:size].chunk(2)[group.rank()] for name, size in sizes.items()}
    models = [_model(size, mine[name]) for name, size in sizes.items()]
    weight = mine["weight"].clone().requires_grad_()
    rows = teacher_rows(*models, group)
    result = linear_head_loss(
        **inputs | {"weight": weight, "teacher_weight": rows},
        chunk_tokens=20,
        group=group,
        settings=KLSettings(kl_weight=0.7, ce_weight=0.4),
    )
    result.loss.backward()
    dist.all_reduce(inputs["hidden"].grad)
    expected = torch.zeros(student_size, weight.shape[1], dtype=torch.float64)
    expected[:common] = truth["weight"]
    pairs = [(getattr(result, name), truth[name]) for name in ("loss", "kl", "cross_entropy")]
    pairs += [(inputs["hidden"].grad, truth["hidden"]), (weight.grad, expected.chunk(2)[group.rank()])]
    return max(relative_error(ours, theirs) for ours, theirs in pairs)


def undivided_error(student_size: int, teacher_size: int, top_k: int | None) -> float:
    """The same where two ranks do not divide the vocabularies: the padding holds what would show itself in any soft-max."""
    torch.manual_seed(0)
    group, common = dist.group.WORLD, min(student_size, teacher_size)
    inputs = make_inputs(torch.float64, vocab=max(student_size, teacher_size))
    inputs["labels"] %= common
    shared = inputs | {name: inputs[name].detach()[:common] for name in ("weight", "teacher_weight")}
    truth = reference(shared, 0.7, 0.4, top_k=top_k)
    mine = {}
    for name, size in (("weight", student_size), ("teacher_weight", teacher_size)):
        rows = inputs[name].detach()[:size]
        mine[name] = torch.cat([rows, torch.full_like(rows[: -size % 2], 100.0)]).chunk(2)[group.rank()].clone()
        assert len(mine[name]) == len(head_part(rows, group)) == -(-size // 2)
        assert torch.equal(whole_head(head_part(rows, group), size, group), rows)
    weight = mine["weight"].requires_grad_()
    rows = teacher_rows(*(_model(size, mine[name]) for name, size in zip(mine, (student_size, teacher_size))), group)
    result = linear_head_loss(
        **inputs | {"weight": weight, "teacher_weight": rows},
        chunk_tokens=20,
        group=group,
        vocabulary=common,
        settings=KLSettings(kl_weight=0.7, ce_weight=0.4, kl_top_k=top_k),
    )
    result.loss.backward()
    dist.all_reduce(inputs["hidden"].grad)
    expected = torch.zeros(2 * len(weight), weight.shape[1], dtype=torch.float64)
    expected[:common] = truth["weight"]
    pairs = [(getattr(result, name), truth[name]) for name in ("loss", "kl", "cross_entropy")]
    if top_k is None:
        first = group.rank() * len(weight)
        kept = min(len(weight), len(rows), max(common - first, 0))
        logits, theirs = (
            inputs[f"{who}hidden"].detach() @ head[:kept].detach().T for who, head in (("", weight), ("teacher_", rows))
        )
        cross_entropy, _, kl, agreement = token_losses(logits, theirs, inputs["labels"], first, group).mean(1)
        pairs += [(kl, truth["kl"]), (cross_entropy, truth["cross_entropy"]), (agreement, truth["agreement"])]
    pairs += [(inputs["hidden"].grad, truth["hidden"]), (weight.grad, expected.chunk(2)[group.rank()])]
    return max(relative_error(ours, theirs) for ours, theirs in pairs)


def _model(size: int, weight: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(hylo=SimpleNamespace(vocab_size=size)), head_weight=lambda: weight)


def check_ties() -> None:
    """Exactly k over both ranks, the same on each, none before a larger value."""
    values = torch.tensor([[[1.0, 3.0, 1.0], [0.0] * 3], [[1.0, 2.0, 1.0], [0.0] * 3]])
    for k in range(1, 6):
        taken = torch.zeros(2, 2, 3, dtype=torch.int64)
        taken[dist.get_rank()] = top_k_mask(values[dist.get_rank()], k, dist.group.WORLD)
        dist.all_reduce(taken)
        assert taken.sum((0, 2)).tolist() == [k, k], (k, taken)
        assert values[:, 0][taken[:, 0].bool()].sort(descending=True).values.tolist() == [3.0, 2.0, 1.0, 1.0, 1.0][:k]


def _show(name: str, error: float) -> None:
    everyone = [None, None]
    dist.all_gather_object(everyone, error)
    if dist.get_rank() == 0:
        print(f"CASE {name}", max(everyone), sep="|", flush=True)


def main() -> None:
    """All cases."""
    dist.init_process_group("gloo")
    check_ties()
    for direction, temperature, top_k, (masked, weights) in CASES:
        _show(
            f"{direction} {temperature=} {top_k=} {masked=} {weights=}",
            worst_error(direction, temperature, top_k, masked, weights),
        )
    for student_size, teacher_size in ((400, 404), (400, 396), (404, 400)):
        _show(f"padded {student_size=} {teacher_size=}", padded_error(student_size, teacher_size))
    for (student_size, teacher_size), top_k in itertools.product(((401, 401), (401, 404), (404, 401)), (None, 5, 301)):
        name = f"undivided {student_size=} {teacher_size=} {top_k=}"
        _show(name, undivided_error(student_size, teacher_size, top_k))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
