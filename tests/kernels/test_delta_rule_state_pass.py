"""The chain of Gated DeltaNet's states on Hopper, against its formula in float64."""

import importlib.util
import inspect

import pytest
import torch
from torch import Tensor

from megatron_hylo.kernels import delta_rule_state_pass
from megatron_hylo.kernels.delta_rule_state_pass import states_backward, states_forward
from megatron_hylo.kernels.delta_rule_states import CHUNK
from megatron_hylo.kernels.gated_delta_rule import gated_delta_rule, recurrent_gated_delta_rule
from megatron_hylo.kernels.registry import in_use, override
from tests.kernels.compare import interpreted_errors, relative_error, worst_error
from tests.kernels.test_gated_delta_rule import inputs

SCALE = 0.2


def chain(k: Tensor, reads: Tensor, values: Tensor, g: Tensor, state: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """States before all chunks and after the last, and what each chunk writes [b, tokens, h, dv]; all float64."""
    states, written = [state], []
    for key, read, value, since in zip(*(x.split(CHUNK, 1) for x in (k, reads, values, g)), strict=True):
        written.append(value - torch.einsum("bthk,bhkv->bthv", read, states[-1]))
        whole = since[:, -1:]
        decayed = key * 2 ** (whole - since)[..., None]
        added = torch.einsum("bthk,bthv->bhkv", decayed, written[-1])
        states.append(states[-1] * 2 ** whole[:, 0, :, None, None] + added)
    return states, written


def tensors(b: int, t: int, h: int, dk: int, dv: int, device: str) -> dict[str, Tensor]:
    """Random arguments, of the size that they have in a layer: keys and reads of length one; a chunk leaves
    half of a state."""
    generator = torch.Generator().manual_seed(t)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    unit = [torch.nn.functional.normalize(normal(b, t, h, dk), dim=-1).bfloat16() for _ in range(3)]
    wide = [normal(b, t, h, dv).bfloat16() for _ in range(3)]
    steps = -torch.rand(b, t, h, generator=generator) / 32
    g = torch.cat([part.cumsum(1) for part in steps.split(CHUNK, 1)], 1)
    names = ("q", "k", "reads", "values", "grad_out", "grad_local", "g", "initial", "grad_last")
    found = (*unit, *wide, g, normal(b, h, dk, dv), normal(b, h, dk, dv))
    return {name: x.to(device) for name, x in zip(names, found, strict=True)}


def test_small_kernels_equal_their_formulas_in_triton_s_interpreter() -> None:
    pytest.importorskip("triton.experimental.gluon")
    errors = interpreted_errors("delta_rule_state_pass_cases")
    assert set(errors) == {"to-end", "whole", "queries"} and max(errors.values()) < 1e-6, errors


def test_cpu_tensors_are_left_to_fla() -> None:
    k = torch.zeros(1, 64, 2, 256, dtype=torch.bfloat16)
    taken, reason = delta_rule_state_pass._takes(k, (k, k), torch.zeros(1, 64, 2))
    assert not taken and reason == "made for Hopper"
    assert in_use()[delta_rule_state_pass.OPERATION] == "fla"


@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs fla")
def test_fla_asks_these_kernels_first_and_as_they_expect() -> None:
    """A renamed or new argument of fla's would leave all to fla, or be ignored: it has to be looked at."""
    delta_rule_state_pass.register()
    backends = importlib.import_module("fla.backends")
    ours = backends._get_operation_registry("common")._get_sorted_backends()[0]
    assert ours.backend_type == "hylo"
    shared = {"q", "k", "w", "g", "state_v_first", "cu_seqlens", "chunk_size", "chunk_indices"}
    states = {"gk", "chunk_offsets"} | shared
    arguments = {
        "chunk_delta_h.chunk_gated_delta_rule_fwd_h": states - {"q"}
        | {"u", "initial_state", "output_final_state", "save_new_value", "cu_seqlens_cpu"},
        "chunk_delta_h.chunk_gated_delta_rule_bwd_dhu": states | {"do", "dv", "h0", "dht", "scale", "use_graph"},
        "chunk_o.chunk_bwd_dqkwg": shared | {"v", "do", "h", "dh", "g_gamma", "dv", "scale"},
    }
    k = torch.zeros(1, 64, 2, 256, dtype=torch.bfloat16)
    for name, expected in arguments.items():
        module, function = name.split(".")
        theirs = getattr(importlib.import_module(f"fla.ops.common.{module}"), function)
        assert set(inspect.signature(theirs).parameters) == expected, name
        given = {x: k for x in ("q", "k", "w", "u", "do", "dv", "v", "h", "dh") if x in expected}
        assert ours.verify(function, g=torch.zeros(1, 64, 2), **given) == (False, "made for Hopper"), name


def need_the_chain() -> None:
    k = torch.zeros(1, 64, 1, 128, dtype=torch.bfloat16, device="cuda")
    if reason := delta_rule_state_pass._unsupported(k, (k,), torch.zeros(1, 64, 1, device="cuda")):
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize(
    ("b", "t", "h", "dk", "dv"),
    [(1, 1, 2, 128, 64), (1, 64, 2, 256, 64), (2, 777, 3, 256, 512), (3, 130, 2, 128, 192), (1, 1500, 1, 256, 768)],
)
def test_chain_and_its_gradients_on_a_gpu(b: int, t: int, h: int, dk: int, dv: int, states: bool) -> None:
    need_the_chain()
    x = tensors(b, t, h, dk, dv, "cuda")
    wide = {name: value.double() for name, value in x.items()}
    before = wide["initial"] if states else torch.zeros_like(wide["initial"])
    leaves = [value.requires_grad_() for value in (before, wide["values"])]
    steps, written = chain(wide["k"], wide["reads"], leaves[1], wide["g"], leaves[0])
    # outputs of the states, scale q S with decays, and whatever the chunks' own outputs say of `written`
    decayed = SCALE * wide["q"] * 2 ** wide["g"][..., None]
    outs = [torch.einsum("bthk,bhkv->bthv", part, state) for part, state in zip(decayed.split(CHUNK, 1), steps)]
    loss = (torch.cat(outs, 1) * wide["grad_out"]).sum() + (torch.cat(written, 1) * wide["grad_local"]).sum()
    if states:
        loss = loss + (steps[-1] * wide["grad_last"]).sum()
    found = torch.autograd.grad(loss, [*steps, *written], allow_unused=True)
    grad_steps, grad_written = list(found[: len(steps)]), torch.cat(found[len(steps) :], 1)
    if not states:
        grad_steps[-1] = torch.zeros_like(steps[-1])

    initial, grad_last = (x["initial"], x["grad_last"]) if states else (None, None)
    found, new, last = states_forward(x["k"], x["reads"], x["values"], x["g"], initial, states)
    backward = states_backward(x["q"], x["k"], x["reads"], x["grad_out"], x["grad_local"], x["g"], initial, grad_last, SCALE)
    pairs = {"states": (found, torch.stack(steps[:-1], 1)), "written": (new, torch.cat(written, 1))}
    pairs |= {"grad_states": (backward[0], torch.stack(grad_steps[1:], 1)), "grad_written": (backward[2], grad_written)}
    if states:
        pairs |= {"last": (last, steps[-1]), "grad_initial": (backward[1], grad_steps[0])}
    errors = {name: relative_error(*pair) for name, pair in pairs.items()}
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < 6e-3, errors  # operands of products are bf16, 2^-9 each: 2e-3 on an H200


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("keep_states", [True, False])
@pytest.mark.parametrize(("t", "dk", "dv"), [(130, 256, 64), (777, 128, 192), (512, 256, 512)])
def test_gated_delta_rule_with_the_chain_on_a_gpu(t: int, dk: int, dv: int, keep_states: bool) -> None:
    need_the_chain()
    values = inputs(t, torch.bfloat16, dk=dk, dv=dv, device="cuda")
    errors = {}
    for implementation in ("gluon", "fla"):
        with override("gated_delta_rule", "fla"), override("delta_rule_state_pass", implementation):
            errors[implementation] = worst_error(
                lambda *x, **y: gated_delta_rule(*x, keep_states=keep_states, **y), recurrent_gated_delta_rule, values
            )
            assert in_use()["delta_rule_state_pass"] == implementation
    print(errors)
    assert errors["gluon"] < max(1.2 * errors["fla"], 5e-3)  # no worse than fla's own kernels


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_chain_recorded_in_a_cuda_graph() -> None:
    need_the_chain()
    *values, _ = inputs(200, torch.bfloat16, dk=128, dv=128, device="cuda")

    def run() -> tuple[Tensor, ...]:
        out, _ = gated_delta_rule(*values)
        return out, *torch.autograd.grad(out.float().square().sum(), values)

    with override("gated_delta_rule", "fla"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = run()
        with torch.no_grad():
            for x in values[:3]:
                x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(recorded, run(), strict=True))
    assert in_use()["delta_rule_state_pass"] == "gluon"
