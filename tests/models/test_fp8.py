"""Linear maps in FP8: refused where they cannot run; on a GPU close to bf16, weights quantised once, in alignment too."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.fp8_utils import TE_LINEAR_TYPES
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megatron_hylo.config import ConfigError
from megatron_hylo.distill import alignment
from megatron_hylo.distill.alignment import align_layers
from megatron_hylo.models import fp8
from megatron_hylo.models.checkpoint import load_model, save_model
from megatron_hylo.models.frozen import freeze
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.models.transformer_config import build_transformer_config
from tests.conftest import tiny_config
from tests.kernels.compare import relative_error

LAYERS, LINEARS = 2, 8  # of a model of SIZES: qkv, proj, fc1, fc2 a layer
SIZES = dict(
    hidden_size=256, ffn_hidden_size=512, num_attention_heads=4, num_query_groups=2, kv_channels=64, vocab_size=512
)  # fmt: skip


def test_megatron_is_told_the_format_and_the_recipe():
    plain, quantised = (build_transformer_config(tiny_config("*-"), fp8=wanted) for wanted in (None, "e4m3"))
    assert plain.fp8 is None
    assert (quantised.fp8, quantised.fp8_recipe, quantised.fp8_param) == ("e4m3", "tensorwise", False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_refused_without_a_gpu(one_rank):
    with pytest.raises(ConfigError, match="fp8 needs a GPU, there is none here"):
        build_model(tiny_config("*-"), fp8="e4m3")


@pytest.mark.parametrize(
    ("backend", "capability", "sentence"),
    [
        ("local", (9, 0), "fp8 needs backend te, not local: backend local was asked for"),
        ("te", (8, 0), "compute capability 8.9 or later, A100 has 8.0"),
    ],
)
def test_other_machines_and_backends_are_refused(monkeypatch, backend, capability, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    monkeypatch.setattr(fp8, "get_backend", lambda name: SimpleNamespace(name=name))
    with pytest.raises(ConfigError, match=sentence):
        fp8.check_fp8(backend)


def test_odd_widths_are_refused(one_rank, monkeypatch):
    monkeypatch.setattr(fp8, "TE_LINEAR_TYPES", (ColumnParallelLinear, RowParallelLinear))
    fp8.check_fp8_widths(build_model(tiny_config("*-", **SIZES), backend="local"))
    with pytest.raises(ConfigError, match=r"linear_fc2 has 104 and 256 on this rank; change tensor_model_parallel_size"):
        fp8.check_fp8_widths(build_model(tiny_config("*-", **SIZES | dict(ffn_hidden_size=104)), backend="local"))


def test_alignment_runs_layers_in_their_own_models_context(one_rank, monkeypatch):
    teacher, student = (build_model(tiny_config("*-*-", **SIZES)) for _ in range(2))
    context, entered = [], []

    class Context:
        def __init__(self, config):
            self.config = config

        def __enter__(self):
            context.append(self.config)

        def __exit__(self, *_):
            context.pop()

    def watched(which, plain):
        def run(layer, *args):
            owner = teacher if any(layer is ours for ours in teacher.decoder.layers) else student
            entered.append((owner, which))
            assert [id(config) for config in context] == [id(owner.config)]
            return plain(layer, *args)

        return run

    monkeypatch.setattr(alignment, "get_fp8_context", Context)
    for which in ("mixer_output", "mlp_layer"):
        monkeypatch.setattr(alignment, which, watched(which, getattr(alignment, which)))
    align_layers([student], teacher, torch.randint(512, (1, 8), device=one_rank), "ild")
    assert len(entered) == 2 * 2 * 2  # models, layers, mixer and MLP


@pytest.fixture
def pair(one_rank, tmp_path):
    """(bf16, FP8) model of the same random weights, loaded from one folder."""
    if not TE_LINEAR_TYPES or torch.cuda.get_device_capability() < fp8.CAPABILITY:
        pytest.skip("needs Transformer Engine and a GPU with FP8")
    folder = tmp_path / "model"
    save_model(build_model(tiny_config("*-" * LAYERS, **SIZES), params_dtype=torch.bfloat16), folder)
    return freeze([load_model(folder, backend="te", fp8=wanted) for wanted in (None, "e4m3")])


def on_a_gpu(test):
    needs = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    return pytest.mark.gpu(needs(test))


@on_a_gpu
def test_output_is_near_that_of_bf16_and_not_the_same(pair):
    """Rounding inputs and weights of every product to E4M3 in plain torch gives 4.7e-2."""
    bf16, quantised = pair
    ids = torch.randint(512, (2, 128), device="cuda")
    with torch.no_grad():
        found = relative_error(quantised(ids), bf16(ids))
    assert 2e-2 < found < 1e-1


@on_a_gpu
def test_weights_are_quantised_once(pair, monkeypatch):
    from transformer_engine.pytorch import Float8CurrentScalingQuantizer, QuantizedTensor

    bf16, quantised = pair
    linears = [module for module in quantised.modules() if isinstance(module, TE_LINEAR_TYPES)]
    assert len(linears) == LINEARS and all(isinstance(module.weight, QuantizedTensor) for module in linears)
    loaded = dict(bf16.named_parameters())
    for name, weight in quantised.named_parameters():  # those of the folder, not those of construction
        error = relative_error(weight.dequantize() if isinstance(weight, QuantizedTensor) else weight, loaded[name])
        assert 1e-2 < error < 4e-2 if isinstance(weight, QuantizedTensor) else error == 0, name
    plain, shapes = Float8CurrentScalingQuantizer.quantize_impl, []

    def counted(quantizer, tensor):
        shapes.append(tuple(tensor.shape))
        return plain(quantizer, tensor)

    monkeypatch.setattr(Float8CurrentScalingQuantizer, "quantize_impl", counted)
    ids = torch.randint(512, (2, 128), device="cuda")
    with torch.no_grad():
        outputs = [quantised(ids) for _ in range(2)]
    assert torch.equal(*outputs)
    assert len(shapes) == 2 * LINEARS, shapes  # the inputs of two passes


@on_a_gpu
@pytest.mark.parametrize("documents", [None, [0, 5, 70]], ids=["whole", "packed"])
def test_alignment_sees_the_rounding_of_every_layer(pair, documents):
    """Against an FP8 teacher the bf16 one is off by its rounding: 3e-3 of the output's power when rounded in plain torch."""
    from megatron_hylo.parallel.documents import PackedDocuments

    bf16, quantised = pair
    ids = torch.randint(512, (1, 128), device="cuda")
    starts = documents and PackedDocuments(torch.tensor(documents, device="cuda"), 128, slice(0, 128))
    (loss,), _ = align_layers([bf16], quantised, ids, documents=starts)
    found = loss.layers[:, 1].tolist()
    assert len(found) == LAYERS and all(1e-3 < layer < 1e-2 for layer in found), found
