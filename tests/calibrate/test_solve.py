"""Output projections in closed form: against least squares, on layers whose solution is known, and on held-out text."""

import pytest
import torch
from torch import Tensor

from megatron_hylo.calibrate import solve
from megatron_hylo.calibrate.shares import NormalEquations
from megatron_hylo.calibrate.solve import output_projection, solve_outputs
from megatron_hylo.calibrate.statistics import CalibrationFolder
from megatron_hylo.config import ConfigError
from megatron_hylo.convert.to_hf import hf_tensors
from megatron_hylo.distill.alignment import relative_distance
from megatron_hylo.eval.perplexity import evaluate
from megatron_hylo.models.checkpoint import load_model
from megatron_hylo.models.hylo_model import HyloModel, build_model
from megatron_hylo.upcycle.assemble import upcycled
from tests.calibrate.tiny import random_teacher
from tests.conftest import EXPERTS, fill_model, tiny_config
from tests.kernels.compare import relative_error


@pytest.fixture(scope="module")
def teacher(material) -> HyloModel:
    return load_model(material.teacher)


@pytest.fixture(scope="module")
def text(material) -> tuple[Tensor, Tensor]:
    return CalibrationFolder(material.done, material.teacher).windows()


@pytest.fixture
def make_student(material, teacher):
    """(mixers, fields) -> a student by the `calibrated` initialiser."""

    def make(mixers: str, full: bool = False, **fields) -> HyloModel:
        base = teacher.config.hylo
        pairs = [0, 0, 1, 1, 2, 3] if not full else sorted(list(range(8)) * 2)
        config = base.replace(
            hybrid_layer_pattern="".join(f"{m}-" for m in mixers), q_lora_rank=48, kv_lora_rank=32 if full else 20,
            qk_head_dim=16, v_head_dim=16, qk_pos_emb_head_dim=2 * len(pairs), linear_num_heads=6, linear_key_head_dim=16,
            linear_value_head_dim=16, mla_rotary_pairs=[pairs if m == "+" else [] for m in mixers] if "+" in mixers else [],
            **fields,
        )  # fmt: skip
        statistics = CalibrationFolder(material.done, material.teacher)
        source = {name: t.detach() for name, t in hf_tensors(teacher)}
        student = build_model(config)
        fill_model(student, upcycled(source.__getitem__, base, config, "calibrated", 0, statistics))
        return student

    return make


def projections(model: HyloModel) -> list[Tensor]:
    return [output_projection(mixer.self_attention).weight for mixer, _ in model.mixer_layers()]


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("damping", [1e-12, 1e-2, 3.0])
def test_solution_is_weighted_least_squares_with_the_prior_as_more_rows(damping, missing):
    features, own, rest, prior = torch.randn(5, 3, 40, 9), torch.randn(5, 3, 40, 4), torch.randn(5, 3, 40, 4), torch.randn(4, 9)
    weight = torch.rand(5, 3, 40)
    equations = NormalEquations()
    for batch in zip(features, own, rest, weight):
        equations.add(*batch)
    root = weight.flatten().double().sqrt()[:, None]
    f, y = features.flatten(0, 2).double() * root, (own + missing * rest).flatten(0, 2).double() * root
    level = damping * float((f.T @ f).trace()) / 9
    rows = torch.cat([f, level**0.5 * torch.eye(9, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(rows, torch.cat([y, level**0.5 * prior.double().T])).solution.T
    found = equations.solve(prior, damping, missing)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    whole = (own + rest).flatten(0, 2).double() * root
    assert equations.error(found) == pytest.approx(float((f @ found.T - whole).square().sum()), rel=1e-5)


def test_a_correction_is_the_best_on_other_tokens_or_none():
    """Tokens whose missing part follows from the features are corrected, others not."""
    projection, generator = torch.randn(4, 9), torch.Generator().manual_seed(1)

    def equations(learnable: bool, tokens: int) -> NormalEquations:
        made, features = NormalEquations(), torch.randn(tokens, 9, generator=generator)
        own, noise = features @ projection.T, torch.randn(tokens, 4, generator=generator)
        made.add(features, own, features @ projection.T if learnable else noise, torch.ones(tokens))
        return made

    weight = projection.double()
    found = {
        learnable: solve._corrected(weight, equations(learnable, 30), equations(learnable, 400)) for learnable in (True, False)
    }
    assert relative_error(found[True], 2 * weight) < 1e-2
    assert torch.equal(found[False], weight)


@pytest.mark.parametrize("sequential", [False, True], ids=["one-shot", "sequential"])
def test_projections_that_fit_exactly_are_found_again(sequential, teacher, text, make_student, monkeypatch):
    """A student equal to its teacher but for spoilt output projections."""
    monkeypatch.setattr(solve, "DAMPING", 1e-10)
    student = make_student("+*+", full=True)
    with torch.no_grad():
        for weight in projections(student)[::2]:
            weight.add_(torch.randn_like(weight) * weight.std())
    errors = solve_outputs(student, teacher, text[0], sequential)
    assert [e.layer for e in errors] == [0, 1, 2] and "".join(e.symbol for e in errors) == "+*+"
    for e in errors:
        assert e.solved < 1e-8 and (e.initial > 0.1 if e.symbol == "+" else e.initial == e.solved), e
    for ours, theirs in zip(projections(student), projections(teacher)):
        assert relative_error(ours, theirs) < 1e-3
    ids = text[1][:, :-1]
    with torch.no_grad():
        assert relative_error(student(ids), teacher(ids)) < 1e-4


def test_a_solved_layer_is_the_ridge_solution_of_its_features(teacher, text, make_student):
    """One-shot, layer 0, written out: features by running the mixer with a unit output projection."""
    student = make_student("+**")
    prior = projections(student)[0].detach().clone()
    ids = text[0][:, :-1]
    held = torch.arange(len(ids)) % 8 == 7
    mixer, attention = (m.mixer_layers()[0][0] for m in (student, teacher))
    with torch.no_grad():
        x = mixer.input_layernorm(teacher.embedding(input_ids=ids, position_ids=None))[0]
        target = attention.self_attention(x)[0].transpose(0, 1).double()
        weight = projections(student)[0]
        parts = []
        for half in torch.eye(96).split(48):
            weight.copy_(half)
            parts.append(mixer.self_attention(x)[0])
        features = torch.cat(parts, -1).transpose(0, 1).double()
        weight.copy_(prior)
    (error, *_) = solve_outputs(student, teacher, text[0], sequential=False)
    f, y = features[~held].flatten(0, 1), target[~held].flatten(0, 1)
    level = solve.DAMPING * (f.T @ f).trace() / 96
    unit = torch.eye(96, dtype=torch.float64)
    wanted = torch.linalg.solve(f.T @ f + level * unit, f.T @ y + level * prior.double().T).T
    assert relative_error(weight, wanted) < 5e-5  # products of features are summed in fp32 within a micro-batch
    for found, by in ((error.initial, prior.double()), (error.solved, wanted)):
        lost = (features[held] @ by.T - target[held]).square().sum() / target[held].square().sum()
        assert found == pytest.approx(float(lost), rel=1e-4)


def test_validation_windows_are_not_solved_on(teacher, text, make_student):
    solved, errors = [], []
    for changed in (None, 7, 15, 3):
        windows, student = text[0].clone(), make_student("G+M", mamba_num_heads=6)
        if changed is not None:
            windows[changed] = windows[changed].flip(0)
        errors.append([e.solved for e in solve_outputs(student, teacher, windows, sequential=False)])
        solved.append([weight.clone() for weight in projections(student)])
    first, *others = solved
    for same in others[:2]:
        assert all(torch.equal(a, b) for a, b in zip(first, same))
    assert errors[0] != errors[1] != errors[2]
    assert all(relative_error(b, a) > 1e-4 for a, b in zip(first, others[2]))


@pytest.mark.parametrize("mixers", ["+++", "GGG", "MMM", "G+M"])
def test_solving_helps_and_sequential_helps_more(mixers, teacher, make_student):
    """On windows that were not solved on: error of the last hidden state, and KL of the predictions. Ample text: a tiny
    teacher's outputs are mostly noise to a linear mixer, which 20 windows would be fitted to."""
    windows = torch.randint(300, (260, 41), generator=torch.Generator().manual_seed(0))
    windows, heldout = windows[:240], windows[240:]
    hidden, kl = {}, {}
    with torch.no_grad():
        wanted = teacher(heldout[:, :-1])
    for how in ("initial", "one-shot", "sequential"):
        student = make_student(mixers, mamba_num_heads=6)
        if how != "initial":
            errors = solve_outputs(student, teacher, windows, how == "sequential")
            assert all(e.solved < e.initial for e in errors), errors
        with torch.no_grad():
            hidden[how] = relative_error(student(heldout[:, :-1]), wanted)
        kl[how] = evaluate(student, heldout, teacher, 4).kl
    print(mixers, hidden, kl)
    for found in (hidden, kl):
        assert found["sequential"] < found["one-shot"] < found["initial"], found


def test_mamba2s_values_are_as_large_as_the_norms_epsilon(teacher, text, make_student):
    """So that what W_O sees still knows lengths."""
    student, seen = make_student("M**", mamba_num_heads=6), []
    mixer = student.mixer_layers()[0][0].self_attention
    norm = mixer.norm
    before = {name: p.detach().clone() for name, p in mixer.named_parameters()}
    solve_outputs(student, teacher, text[0], sequential=True)
    norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    with torch.no_grad():
        student(text[0][:, :-1])
    y, gate = seen[0][:2]
    y = y * torch.nn.functional.silu(gate)
    assert float(y.square().mean().sqrt()) == pytest.approx(student.config.layernorm_epsilon**0.5, rel=0.5)
    changed = {name for name, p in mixer.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"dt_bias", "A_log", "out_proj.weight"}
    rate = [torch.nn.functional.softplus(p["dt_bias"]) * p["A_log"].exp() for p in (before, dict(mixer.named_parameters()))]
    torch.testing.assert_close(*rate)  # states decay as before


@pytest.mark.parametrize("mlps", [False, True])
def test_nothing_but_output_projections_changes(mlps, teacher, text, make_student):
    student = make_student("+*G")
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    solve_outputs(student, teacher, text[0].repeat(8, 1), sequential=True, mlps=mlps)
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    layer = "decoder.layers.{}.{}.weight".format
    of_mixers = {layer(0, "self_attention.linear_proj"), layer(4, "self_attention.out_proj")}
    assert changed == of_mixers | {layer(i, "mlp.linear_fc2") for i in (1, 3, 5) if mlps}


def test_hidden_states_are_as_far_from_the_teachers_as_reported(teacher, make_student):
    """The last layer's, from whole forward passes over text that was not solved on."""
    windows = torch.randint(300, (64, 41), generator=torch.Generator().manual_seed(0))
    student = make_student("+GM", mamba_num_heads=6)
    errors = solve_outputs(student, teacher, windows, sequential=True)
    seen = []
    for model in (student, teacher):
        layer = model.mixer_layers()[-1][1]
        hook = layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        with torch.no_grad():
            model(windows[7::8, :-1])
        hook.remove()
    ours, theirs = seen
    distance = (ours - theirs).square().sum(-1) / (ours.square().sum(-1) + theirs.square().sum(-1))
    assert errors[-1].hidden == pytest.approx(float(distance.mean()), rel=1e-4) and errors[-1].hidden > 0.01


def test_a_single_window_is_refused(teacher, text, make_student):
    with pytest.raises(ConfigError, match="at least 2 windows, got 1"):
        solve_outputs(make_student("+**"), teacher, text[0][:1])


def test_few_windows_keep_the_last_for_validation(teacher, text, make_student):
    weights = []
    for last in (2, 5):
        student = make_student("+**")
        solve_outputs(student, teacher, text[0][[0, 1, last]])
        weights.append(projections(student)[0])
    assert torch.equal(*weights)


def test_outputs_that_are_not_finite_are_refused(teacher, text, make_student):
    student = make_student("*+*")
    with torch.no_grad():
        student.mixer_layers()[1][0].self_attention.linear_kv_up_proj.weight[3, 3] = torch.nan
    with pytest.raises(ConfigError, match="layer 1 `\\+`: its outputs are not finite"):
        solve_outputs(student, teacher, text[0], sequential=True)


def test_sequential_solving_goes_through_experts_and_leaves_them(one_rank):
    """Mixers make up for the layers before them; experts, which a student shares with its teacher, stay as they are."""
    config = tiny_config("*E*-*E", **EXPERTS)
    teacher = random_teacher(config)
    student = build_model(config.with_mixers("G+M"))
    theirs, ours = dict(teacher.named_parameters()), dict(student.named_parameters())
    with torch.no_grad():
        for name, p in ours.items():
            if ".self_attention." not in name:
                p.copy_(theirs[name])
    windows = torch.randint(160, (6, 41))
    error = solve_outputs(student, teacher, windows, sequential=True)[-1]
    hidden: list[Tensor] = []
    for model in (student, teacher):
        handle = model.mixer_layers()[-1][0].register_forward_hook(lambda _, inputs, out: hidden.append(out[0]))
        with torch.no_grad():
            model.eval()(windows[-1:, :-1])  # held out
        handle.remove()
    assert error.hidden == pytest.approx(float(relative_distance(*hidden).mean()), rel=1e-3)
    changed = {name for name, p in ours.items() if ".self_attention." not in name and not torch.equal(p, theirs[name])}
    assert changed == {"decoder.layers.3.mlp.linear_fc2.weight"}
