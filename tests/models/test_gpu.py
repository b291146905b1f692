"""On a GPU: the mixers with their fast kernels against the fp32 reference on the CPU, outputs and gradients."""

import contextlib
import copy

import pytest
import torch

from megatron_hylo.kernels.registry import in_use, override
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.parallel.documents import PackedDocuments
from tests.conftest import tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SIZES = dict(
    hidden_size=256, ffn_hidden_size=512, kv_channels=64, q_lora_rank=192, kv_lora_rank=96, qk_head_dim=32,
    qk_pos_emb_head_dim=32, v_head_dim=64, mamba_head_dim=64, mamba_state_dim=64, linear_key_head_dim=128,
    linear_value_head_dim=256, vocab_size=512,
)  # fmt: skip


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def errors(mixer: str, backend: str, tokens: int, batch: int, starts: list[int] | None, where: str) -> dict[str, float]:
    """Relative error of the output and of all gradients: bf16 with the fast kernels, against plain torch in fp32 on `where`."""
    config = tiny_config(f"{mixer}-", **SIZES)
    reference = build_model(config, backend="local").mixer_layers()[0][0].self_attention
    if mixer == "M":  # where D x is most of the output, the norm after it cancels D's gradient and leaves bf16's rounding
        torch.nn.init.uniform_(reference.D, 0.1, 0.3)
    with torch.no_grad():  # both compute with the same numbers
        for parameter in reference.parameters():
            parameter.copy_(parameter.bfloat16())
    fast = build_model(config, params_dtype=torch.bfloat16, backend=backend).mixer_layers()[0][0].self_attention
    state = {k: v for k, v in reference.state_dict().items() if not k.endswith("_extra_state")}
    missing, unexpected = fast.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("_extra_state") for name in missing)
    x, upstream = torch.randn(tokens, batch, 256).bfloat16(), torch.randn(tokens, batch, 256)
    results = []
    for module, on, dtype in ((reference.to(where), where, torch.float32), (fast, "cuda", torch.bfloat16)):
        inputs = x.to(on, dtype).requires_grad_()
        documents = starts and PackedDocuments(torch.tensor(starts, device=on), tokens, slice(0, tokens))
        with contextlib.ExitStack() as plain:
            for op in ("gated_delta_rule", "ssd", "causal_conv1d") if module is reference else ():
                plain.enter_context(override(op, "torch"))
            out, _ = module(inputs, packed_seq_params=documents)
            (out.float() * upstream.to(on)).sum().backward()
        grads = {name: p.grad for name, p in module.named_parameters()}
        results.append({"output": out.detach(), "input": inputs.grad} | grads)
    theirs, ours = results
    found = {name: relative(ours[name].cpu(), theirs[name].cpu()) for name in theirs}
    print(mixer, backend, tokens, in_use(), {k: f"{v:.1e}" for k, v in found.items()})
    return found


@pytest.mark.parametrize("starts", [None, [0, 1, 3, 70, 300, 302]], ids=["whole", "packed"])
@pytest.mark.parametrize("backend", ["local", "te"])
@pytest.mark.parametrize("mixer", ["*", "+", "M", "G"])
def test_bf16_mixer_matches_fp32_reference(mixer, backend, starts, one_rank):
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if backend == "te" and not HAVE_TE:
        pytest.skip("needs Transformer Engine")
    found = errors(mixer, backend, 777, 1 if starts else 2, starts, "cuda")
    # few numbers each, whose gradients are sums over all tokens that nearly cancel
    decays = {name: found.pop(name) for name in ("A_log", "dt_bias") if name in found}
    assert max(found.values()) < 3e-2, found
    assert max(decays.values(), default=0) < 6e-2, decays


@pytest.mark.parametrize("mixer", ["*", "+", "M", "G"])
def test_bf16_mixer_matches_the_cpu_at_8192_tokens(mixer, one_rank):
    found = errors(mixer, "local", 8192, 1, None, "cpu")
    decays = {name: found.pop(name) for name in ("A_log", "dt_bias") if name in found}
    assert max(found.values()) < 1e-2, found
    assert max(decays.values(), default=0) < 2e-2, decays


def test_one_step_of_training_lowers_the_loss(one_rank):
    """fp32 masters over bf16 weights through Megatron-Core's optimizer, on CUDA with nothing patched."""
    from megatron_hylo.config.train import OptimizerSettings, TrainConfig
    from megatron_hylo.train.objectives import get_objective
    from megatron_hylo.train.optimizer import build_training_state

    settings = TrainConfig(
        stage="pretrain", data="-", output="-", scratch="-", sequence_length=128, global_batch_size=4, micro_batch_size=4,
        train_tokens=128 * 4 * 20, optimizer=OptimizerSettings(lr=3e-3, warmup_ratio=0.0),
    )  # fmt: skip
    model = build_model(tiny_config(**SIZES), params_dtype=torch.bfloat16)
    state, stage = build_training_state([model], settings), get_objective(settings, None)
    ids = torch.randint(512, (4, 129), device="cuda")
    batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
    losses = []
    for _ in range(20):
        state.wrapped[0].zero_grad_buffer()
        state.optimizer.zero_grad()
        losses.append(stage.forward_backward([state], iter([copy.copy(batch)]), 1)["loss"].item())
        state.optimizer.step()
        state.scheduler.step(1)
    assert losses[-1] < 0.7 * losses[0], losses
