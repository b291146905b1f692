"""Layer-wise alignment against whole forward passes: the teacher's with hooks, the student's in one autograd graph.

Both losses are written out again here from the module's formulas.
"""

from functools import partial

import pytest
import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor, nn

from megatron_hylo.config import ConfigError
from megatron_hylo.distill.alignment import align_layers, check_alignable
from megatron_hylo.models.hylo_model import HyloModel, build_model
from tests.conftest import gradients, tiny_config, uneven_model
from tests.kernels.compare import relative_error

TOLERANCE = 1e-6


@pytest.fixture(autouse=True)
def fixed_model_seed(one_rank) -> None:
    """Models are the same whatever ran before: Megatron-Core draws weights from generators of its own."""
    model_parallel_cuda_manual_seed(1234, force_reset_rng=True)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(160, (2, 19))


def recorded(modules: dict[str, nn.Module], run, batch: int) -> dict[str, Tensor]:
    """Outputs of modules during `run()`, [sequence, batch, c]; a whole model has its windows end to end."""
    seen: dict[str, Tensor] = {}

    def hook(name: str):
        def keep(module, args, out):
            out = out[0] if isinstance(out, tuple) else out
            seen[name] = out.view(batch, -1, out.shape[-1]).transpose(0, 1) if out.shape[1] == 1 else out

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    run()
    for handle in handles:
        handle.remove()
    return seen


def reference_loss(
    student: HyloModel,
    teacher: HyloModel,
    ids: Tensor,
    hidden_weight: float = 0.0,
    mixer_weight: float = 1.0,
    loss: str = "ild",
) -> tuple[Tensor, Tensor]:
    """(loss, [layers, 2] terms) as the module's formulas say, through Megatron-Core's own layers."""
    last = len(teacher.mixer_layers()) - 1
    watched: dict[str, nn.Module] = {"embedding": teacher.embedding, f"h{last}": teacher.decoder.final_norm}
    for i, (mixer, mlp) in enumerate(teacher.mixer_layers()):
        watched = {f"a{i}": mixer.self_attention, f"h{i}": mlp} | watched
    with torch.no_grad():
        targets = recorded(watched, lambda: teacher(ids), len(ids))
    given, terms = targets["embedding"], []
    for i, (mixer, mlp) in enumerate(student.mixer_layers()):
        outputs = recorded({"a": mixer.self_attention, "middle": mixer}, partial(mixer, given, attention_mask=None), len(ids))
        hidden = mlp(outputs["middle"], attention_mask=None)
        hidden = student.decoder.final_norm(hidden[0]) if i == last else hidden[0]
        pairs = [(hidden, targets[f"h{i}"]), (outputs["a"], targets[f"a{i}"])]
        if loss == "mse":
            ours, theirs = pairs[1]
            relative = ((ours - theirs).square().sum((0, 2)) / theirs.square().sum((0, 2))).mean()  # of each window alone
            terms.append(torch.stack([torch.zeros_like(relative), relative]))
        else:
            terms.append(torch.stack([(ours - theirs).square().sum(-1).sqrt().mean() for ours, theirs in pairs]))
        given = targets[f"h{i}"]
    terms = torch.stack(terms)
    return hidden_weight * terms[:, 0].sum() + mixer_weight * terms[:, 1].sum(), terms


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 1.7)])
@pytest.mark.parametrize("qk_layernorm", [False, True])
def test_equals_one_graph_over_whole_forwards(weights, qk_layernorm, one_rank, ids):
    student = uneven_model("G-+-M-*-+-", qk_layernorm=qk_layernorm)
    teacher = uneven_model("*-*-*-*-*-", qk_layernorm=qk_layernorm)
    loss, terms = reference_loss(student, teacher, ids, *weights)
    loss.backward()
    theirs = gradients(student)
    ((result,), _) = align_layers([student], teacher, ids, "ild", *weights, gradient_scale=1.0)
    ours = gradients(student)
    assert relative_error(result.loss, loss) < TOLERANCE
    assert relative_error(result.layers, terms) < TOLERANCE
    assert ours.keys() == theirs.keys()
    assert set(ours) == {n for n, _ in student.named_parameters() if not n.startswith(("embedding.", "output_layer."))}
    found = {name: relative_error(ours[name], theirs[name]) for name in ours}
    print(f"worst gradient {max(found.values()):.1e}")
    assert max(found.values()) < TOLERANCE, found
    assert not gradients(teacher)

    align_layers([student], teacher, ids, "ild", *weights, gradient_scale=0.25)
    assert all(relative_error(g, 0.25 * theirs[name]) < TOLERANCE for name, g in gradients(student).items())
    ((measured,), _) = align_layers([student], teacher, ids, "ild", *weights)
    assert not measured.loss.requires_grad and not gradients(student)
    assert torch.equal(measured.layers, result.layers)


@pytest.mark.parametrize("qk_layernorm", [False, True])
def test_normalised_squares_equal_one_graph_over_whole_forwards(qk_layernorm, one_rank, ids):
    student = uneven_model("G-+-M-*-+-", qk_layernorm=qk_layernorm)
    teacher = uneven_model("*-*-*-*-*-", qk_layernorm=qk_layernorm)
    loss, terms = reference_loss(student, teacher, ids, loss="mse")
    loss.backward()
    theirs = gradients(student)
    ((result,), _) = align_layers([student], teacher, ids, "mse", 0.3, 1.7, gradient_scale=1.0)  # ild's weights do nothing
    ours = gradients(student)
    assert relative_error(result.loss, loss) < TOLERANCE
    assert relative_error(result.layers, terms) < TOLERANCE
    assert ours.keys() == theirs.keys()
    # nothing past the mixers' outputs has a gradient: what choose_trainable freezes
    assert all(".self_attention." in name or ".input_layernorm." in name for name in ours)
    assert {name for name, _ in student.named_parameters() if ".self_attention." in name} <= set(ours)
    found = {name: relative_error(ours[name], theirs[name]) for name in ours}
    assert max(found.values()) < TOLERANCE, found
    assert not gradients(teacher)

    align_layers([student], teacher, ids, gradient_scale=0.25)  # mse is the default
    assert all(relative_error(g, 0.25 * theirs[name]) < TOLERANCE for name, g in gradients(student).items())


def test_sequential_equals_a_whole_forward_whose_layers_are_cut_apart(one_rank, ids):
    """The student's own forward pass, one graph a layer, against the teacher's residual stream before each MLP."""
    student, teacher = uneven_model("G-+-M-*-+-"), uneven_model("*-*-*-*-*-")
    names = [f"m{i}" for i in range(5)]
    with torch.no_grad():
        targets = recorded(dict(zip(names, (mixer for mixer, _ in teacher.mixer_layers()))), lambda: teacher(ids), len(ids))
        hidden = student.embedding(input_ids=ids, position_ids=None)
    terms = []
    for name, (mixer, mlp) in zip(names, student.mixer_layers()):
        out = mixer(hidden, attention_mask=None)[0]
        ours, theirs = out.float(), targets[name].float()
        size = (ours.square().sum(-1) + theirs.square().sum(-1)).detach()
        terms.append(((ours - theirs).square().sum(-1) / size).mean())
        with torch.no_grad():
            hidden = mlp(out.detach(), attention_mask=None)[0]
    sum(terms).backward()
    with torch.no_grad():  # what was cut apart is the student's forward pass
        assert relative_error(student.decoder.final_norm(hidden), student(ids)) < TOLERANCE
    theirs = gradients(student)
    ((result,), _) = align_layers([student], teacher, ids, "sequential", gradient_scale=1.0)
    ours = gradients(student)
    assert relative_error(result.layers[:, 1], torch.stack(terms)) < TOLERANCE and not result.layers[:, 0].any()
    assert ours.keys() == theirs.keys() and not any(".mlp." in name for name in ours)
    found = {name: relative_error(ours[name], theirs[name]) for name in ours}
    assert max(found.values()) < TOLERANCE, found
    assert not gradients(teacher)


def test_normalised_squares_are_one_for_a_silent_mixer_and_do_not_change_with_scale(one_rank, ids):
    student, teacher = uneven_model("*-*-*-"), uneven_model("*-*-*-")
    with torch.no_grad():
        for mixer, _ in student.mixer_layers():
            mixer.self_attention.linear_proj.weight.zero_()
        ((silent,), _) = align_layers([student], teacher, ids)
        assert torch.allclose(silent.layers, torch.tensor([[0.0, 1.0]] * 3), atol=1e-6)
        assert silent.loss.item() == pytest.approx(3.0, rel=1e-6)
        student.load_state_dict(teacher.state_dict())
        for model, factor in ((teacher, 100.0), (student, 110.0)):
            for mixer, _ in model.mixer_layers():
                mixer.self_attention.linear_proj.weight *= factor
        ((scaled,), _) = align_layers([student], teacher, ids)
    assert torch.allclose(scaled.layers[:, 1], torch.full((3,), 0.01), rtol=1e-5)  # (1.1 - 1)^2, whatever the teacher's scale


@pytest.mark.parametrize("loss", ["mse", "ild", "sequential"])
def test_two_students_share_a_pass_and_learn_as_each_would_alone(loss, one_rank, ids):
    teacher = uneven_model("*-*-*-*-")
    students = [uneven_model("+-" * 4), uneven_model("G-" * 4)]
    alone = [align_layers([student], teacher, ids, loss, gradient_scale=0.5)[0][0] for student in students]
    separate = [gradients(student) for student in students]
    calls = []
    handle = teacher.mixer_layers()[2][1].mlp.register_forward_hook(lambda *_: calls.append(1))
    together, _ = align_layers(students, teacher, ids, loss, gradient_scale=0.5)
    handle.remove()
    assert len(calls) == 1
    for mine, theirs, student, expected in zip(together, alone, students, separate):
        assert torch.equal(mine.layers, theirs.layers) and torch.equal(mine.loss, theirs.loss)
        found = gradients(student)
        assert found.keys() == expected.keys() and len(found) > 16
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not torch.equal(together[0].layers, together[1].layers)


@pytest.mark.parametrize("loss", ["mse", "ild"])
@pytest.mark.parametrize("symbol", ["G", "M", "+"])
def test_a_layer_learns_the_same_in_a_hybrid_as_in_a_pure_model(symbol, loss, one_rank, ids):
    """Independence of layers lets stage 1 align the pure models once and assemble any hybrid from them."""
    teacher = uneven_model("*-*-*-*-")
    hybrid = uneven_model("G-+-M-+-")
    pure = uneven_model(f"{symbol}-" * 4)
    shared = [i for i, s in enumerate(hybrid.config.hylo.mixers) if s == symbol]
    prefixes = tuple(f"decoder.layers.{2 * i + k}." for i in shared for k in (0, 1))
    weights = dict(hybrid.named_parameters())
    with torch.no_grad():
        for name, p in pure.named_parameters():
            if name.startswith((*prefixes, "decoder.final_norm.")):
                p.copy_(weights[name])
    results = [align_layers([model], teacher, ids, loss, gradient_scale=1.0)[0][0] for model in (hybrid, pure)]
    assert torch.equal(results[0].layers[shared], results[1].layers[shared])
    in_hybrid, in_pure = gradients(hybrid), gradients(pure)
    names = [name for name in in_hybrid if name.startswith(prefixes)]
    assert len(names) > (6 if loss == "ild" else 3) * len(shared)
    assert all(torch.equal(in_hybrid[name], in_pure[name]) for name in names)
    assert all(in_hybrid[name].norm() > 0 for name in names)


@pytest.mark.parametrize("loss", ["mse", "ild", "sequential"])
def test_a_student_equal_to_its_teacher_has_no_loss_and_finite_gradients(loss, one_rank, ids):
    teacher = uneven_model("*-*-*-")
    student = uneven_model("*-*-*-")
    student.load_state_dict(teacher.state_dict())
    ((result,), _) = align_layers([student], teacher, ids, loss, gradient_scale=1.0)
    assert result.loss.item() == 0
    found = gradients(student)
    assert found and all(g.count_nonzero() == 0 for g in found.values())  # NaN would count


@pytest.mark.parametrize("skipped", ["hidden", "mixer"])
def test_a_term_of_weight_zero_is_skipped(skipped, one_rank, ids):
    student, teacher = uneven_model("G-+-M-"), uneven_model("*-*-*-")
    ((both,), _) = align_layers([student], teacher, ids, "ild")
    weights = (0.0, 1.0) if skipped == "hidden" else (1.0, 0.0)
    ((one,), _) = align_layers([student], teacher, ids, "ild", *weights, gradient_scale=1.0)
    ours = gradients(student)
    column = 0 if skipped == "hidden" else 1
    assert one.layers[:, column].count_nonzero() == 0
    assert torch.equal(one.layers[:, 1 - column], both.layers[:, 1 - column])
    assert one.loss.item() == pytest.approx(both.layers[:, 1 - column].sum().item(), rel=1e-6)
    reference_loss(student, teacher, ids, *weights)[0].backward()
    theirs = gradients(student)
    trained_mlp = any(".mlp." in name for name in ours)
    assert trained_mlp == (skipped == "mixer")
    assert all(relative_error(g, theirs[name]) < TOLERANCE for name, g in ours.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 96}, "same vocab_size: student 160, teacher 96"),
        ({"hidden_size": 64}, "same hidden_size: student 48, teacher 64"),
        ({"hybrid_layer_pattern": "*-*-"}, "same num_hidden_layers: student 3, teacher 2"),
    ],
)
def test_a_teacher_that_does_not_pair_is_refused(changes, message, one_rank):
    student = build_model(tiny_config("G-+-M-"))
    check_alignable(student, build_model(tiny_config("*-*-*-")))
    teacher = build_model(tiny_config("*-*-*-").replace(**changes))
    with pytest.raises(ConfigError, match=message):
        check_alignable(student, teacher)
