"""The plugin without vLLM: its table of tensors, refused versions, latents as one head's keys."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_hylo.config.errors import ConfigError
from megatron_hylo.config.mixers import tensor_parallel_sizes
from megatron_hylo.hf import HyloConfig, HyloForCausalLM
from megatron_hylo.hf.recurrent_hylo import HyloMamba2
from megatron_hylo.serve import vllm as plugin
from megatron_hylo.serve.vllm import check_version
from megatron_hylo.serve.vllm.latent_kernels import (
    Cached,
    Prefill,
    decode_torch,
    key_scales,
    prefill_flash,
    prefill_torch,
    split_scales,
)
from megatron_hylo.serve.vllm.weights import load_tensors, repeat_mamba_groups, tensor_table
from tests.serve.vllm.models import BASE, MODELS

REGISTERED = """
import sys
import megatron_hylo.serve.vllm as plugin
assert "torch" not in sys.modules and "transformers" not in sys.modules
sys.modules["vllm"] = {vllm}
plugin.register()
plugin.register()
from transformers import AutoConfig
try:
    AutoConfig.from_pretrained({folder!r})
except ImportError as error:
    print(error)
"""


def test_the_plugin_is_small():
    """1,200 lines at most: what vLLM has is not made again."""
    assert sum(len(file.read_text().splitlines()) for file in Path(plugin.__file__).parent.glob("*.py")) <= 1200


def config_of(name: str) -> HyloConfig:
    return HyloConfig(hylo=BASE | MODELS[name])


@pytest.mark.parametrize("name", MODELS)
def test_the_table_names_every_exported_tensor_once(name):
    config = config_of(name)
    with torch.device("meta"):
        model = HyloForCausalLM(config)
    exported = set(model.state_dict()) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    sources = [source for sources in tensor_table(config).values() for source in sources]
    assert len(sources) == len(set(sources)) and set(sources) == exported


class Parameter:
    """Takes tensors as a parameter of vLLM does, and remembers them."""

    def weight_loader(self, _, tensor):
        self.value = tensor


@pytest.fixture
def tensors():
    config = config_of("mla_gdn")
    return config, dict(HyloForCausalLM(config).state_dict())


def test_joined_parameters_are_the_exported_tensors_in_any_order(tensors):
    config, exported = tensors
    parameters = {name: Parameter() for name in tensor_table(config)}
    loaded = load_tensors(config, parameters, reversed(exported.items()), None)
    assert loaded == set(parameters)
    name = "model.layers.0.linear_attn"
    joined = torch.cat([exported[f"{name}.{part}_proj.weight"] for part in "qkvg"])
    assert torch.equal(parameters[f"{name}.in_proj_qkvz.weight"].value, joined)


@pytest.mark.parametrize("change, message", [
    ({"model.norm.weight": None}, "lacks 1 of .* model.norm.weight"),
    ({"model.layers.0.linear_attn.k_conv1d.weight": None}, "lacks 1 of"),
    ({"model.layers.0.linear_attn.k_conv1d.bias": torch.zeros(3)}, "k_conv1d.bias is unknown; export the model again"),
    ({"model.layers.0.linear_attn.A_log": torch.zeros(4)}, r"linear_attn.A_log is \[4\], for config.json \[2\]; export"),
    ({"model.layers.0.mlp.up_proj.weight": torch.zeros(256, 127)}, r"up_proj.weight is \[256, 127\], for .* \[256, 128\]"),
])  # fmt: skip
def test_a_missing_unknown_or_wrong_tensor_is_named(tensors, change, message):
    config, exported = tensors
    weights = [(name, tensor) for name, tensor in (exported | change).items() if tensor is not None]
    with pytest.raises(ConfigError, match=message):
        load_tensors(config, {name: Parameter() for name in tensor_table(config)}, weights, None)


def test_repeated_mamba_groups_equal_the_exported_layers_own_repetition():
    """x and B by in_proj with repeated rows are those that HyloMamba2 repeats after its projection."""
    config = config_of("mla_mamba2")
    layer, c = HyloMamba2(config, 0), config.architecture()
    x = torch.randn(5, config.hidden_size)
    z, xbc, dt = layer.in_proj(x).split([256, sum(layer.sections), 4], dim=-1)
    parts = xbc.split(layer.sections, dim=-1)
    repeated = [part.unflatten(-1, (2, -1)).repeat_interleave(2, 1).flatten(1) for part in parts[:2]]
    expected = torch.cat([z, *repeated, parts[2], dt], dim=-1)
    weight = repeat_mamba_groups(layer.in_proj.weight, "in_proj.weight", c)
    torch.testing.assert_close(x @ weight.T, expected)
    assert len(repeat_mamba_groups(layer.conv1d.bias, "conv1d.bias", c)) == weight.shape[0] - 256 - 4


@pytest.mark.parametrize("scaled", [False, True])
def test_attention_to_pages_of_latents_equals_softmax_over_whole_keys(scaled):
    heads, groups, rank, rotary, scale = 4, 2, 24, 8, 0.3
    lengths, page, width = [1, 16, 37, 0], 16, rank + rotary + 2 * groups
    cache = torch.randn(9, page, width, dtype=torch.float64)
    scales = torch.rand(9, page, groups) + 0.5
    cache[..., rank + rotary :] = split_scales(scales.flatten(0, 1), torch.float32).unflatten(0, (9, page))
    table = torch.tensor([[3, 0, 0], [1, 0, 0], [7, 2, 5], [0, 0, 0]], dtype=torch.int32)
    query, offset = torch.randn(4, heads, rank + rotary, dtype=torch.float64), torch.randn(4, heads)
    cached = Cached(cache, table, torch.tensor(lengths), rank, groups)
    out = decode_torch(query, offset if scaled else None, cached, scale)
    for i, length in enumerate(lengths[:3]):
        rows = torch.stack([cache[table[i, t // page], t % page] for t in range(length)])
        for head in range(heads):
            scores = rows[:, : rank + rotary] @ query[i, head]
            if scaled:
                factor = torch.stack([scales[table[i, t // page], t % page] for t in range(length)])[:, head // 2]
                scores = (scores + offset[i, head]) * factor
            torch.testing.assert_close(out[i, head], (scores * scale).softmax(0) @ rows[:, :rank], rtol=1e-5, atol=1e-6)
    assert not out[3].any(), "a request of padding"


@pytest.mark.parametrize(("plain", "rotary", "value", "copies"), [(12, 4, 16, True), (16, 8, 24, False), (16, 8, 16, True)])
def test_flash_attention_is_given_aligned_tensors_of_one_width(monkeypatch, plain, rotary, value, copies):
    """Values are a view behind a head's unrotated keys; a flash kernel reads 16 bytes at a time, and fails between them."""
    given = {}

    def flash(q, k, v, **others):
        given.update(q=q, k=k, v=v)
        return prefill_torch(q, k, v, prefill, others["softmax_scale"])

    stub = SimpleNamespace(flash_attn_varlen_func=flash, get_flash_attn_version=lambda: 3)
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.fa_utils", stub)
    for name in ("vllm.v1.attention.backends", "vllm.v1.attention", "vllm.v1", "vllm"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    both = torch.randn(9, 2, plain + value).bfloat16()
    keys, values = both.split([plain, value], dim=-1)
    keys = torch.cat([keys, torch.randn(9, 2, rotary).bfloat16()], dim=-1)
    query = torch.randn(7, 4, plain + rotary).bfloat16()
    prefill = Prefill(slice(0, 7), [4, 3], [6, 3], torch.tensor([0, 4, 7]), torch.tensor([0, 6, 9]), None, None)
    out = prefill_flash(query, keys, values, prefill, 0.3)
    torch.testing.assert_close(out, prefill_torch(query, keys, values, prefill, 0.3))
    for x in given.values():
        assert x.shape[-1] == max(plain + rotary, value) and x.stride(-1) == 1
        assert not any(place % 16 for place in (x.data_ptr(), *(2 * step for step in x.stride()[:-1])))
    assert (given["v"].data_ptr() != values.data_ptr()) == copies


def test_scales_in_two_parts_have_twice_the_digits():
    scales = torch.rand(1000, 3) + 0.5
    error = (key_scales(split_scales(scales, torch.bfloat16), 3) / scales - 1).abs().max()
    assert error < 2**-16
    assert (scales.bfloat16().float() / scales - 1).abs().max() > 2**-9.5


@pytest.mark.parametrize("version, fits", [
    ("0.25.1", False), ("0.26.0", True), ("0.30.2+cpu", True), ("0.32.9", True), ("0.33.0rc1", False), ("1.0.0", False),
])  # fmt: skip
def test_only_tested_versions_are_served_with(version, fits):
    if fits:
        return check_version(version)
    with pytest.raises(ImportError, match=rf"vLLM 0\.26\.0 to 0\.32\.0, but {version}.*pip install 'vllm>=0\.26\.0,<0\.33'"):
        check_version(version)


def test_registering_never_raises_and_the_model_is_refused_with_the_reason(tmp_path):
    """Without vLLM, and with one that is too new; transformers is told why when a HyLo model is loaded."""
    (tmp_path / "config.json").write_text('{"model_type": "hylo"}')
    newer = "type(sys)('vllm'); sys.modules['vllm'].__version__ = '9.9.9'"
    for vllm, reason in (("None", "vllm"), (newer, "vLLM 0.26.0 to 0.32.0")):
        code = REGISTERED.format(vllm=vllm, folder=str(tmp_path))
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        assert printed.returncode == 0, printed.stderr
        assert "HyLo models cannot be served here" in printed.stdout and reason in printed.stdout


def test_tensor_parallel_sizes_divide_all_heads():
    assert tensor_parallel_sizes(config_of("mla_gdn").architecture()) == [1, 2]
    assert tensor_parallel_sizes(config_of("gdn_wide_heads").architecture()) == [1]
    assert tensor_parallel_sizes(config_of("nine_heads").architecture()) == [1, 3]
