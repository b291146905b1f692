"""Conversions end with a comparison with transformers, which finds planted faults; large models are read layer by layer."""

import pytest
import torch
import transformers

from megatron_hylo.cli.main import main
from megatron_hylo.config import ConfigError
from megatron_hylo.convert import oracle as oracle_module
from megatron_hylo.convert import to_hf
from megatron_hylo.convert.hf_reader import open_source
from megatron_hylo.convert.oracle import open_oracle
from megatron_hylo.convert.safetensors_reader import SafetensorsSource
from megatron_hylo.convert.to_hf import convert_megatron_to_hf
from megatron_hylo.convert.to_megatron import convert_hf_to_megatron
from megatron_hylo.convert.verify import verify_conversion
from megatron_hylo.models.checkpoint import save_model
from megatron_hylo.models.hylo_model import build_model
from tests.conftest import tiny_config, tiny_hf_model
from tests.convert.quantised_folders import float8, quantise_folder

NOTHING_WRITTEN = "not the one that transformers loads, and nothing was written"


@pytest.fixture
def folder(tmp_path):
    tiny_hf_model("qwen3", False).bfloat16().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def rounds(self, name, read=SafetensorsSource.read):
    return read(self, name) * 1.01 if name == "model.layers.1.mlp.down_proj.weight" else read(self, name)


def test_a_reader_that_changes_one_weight_is_found(one_rank, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(SafetensorsSource, "read", rounds)
    with pytest.raises(ConfigError, match=NOTHING_WRITTEN) as error:
        convert_hf_to_megatron(folder, tmp_path / "megatron")
    assert "layers.1.mlp.down_proj.weight: max |delta|" in str(error.value)
    assert "hidden states part after layer 1" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    convert_hf_to_megatron(folder, tmp_path / "megatron", verify=False)
    assert (tmp_path / "megatron" / "manifest.json").is_file()


def test_a_setting_that_is_read_wrong_is_found(one_rank, folder, tmp_path, monkeypatch):
    """All tensors are equal; only the computation differs."""
    init = SafetensorsSource.__init__

    def other_base(self, path):
        init(self, path)
        self.config = self.config.replace(rotary_base=20000.0)

    monkeypatch.setattr(SafetensorsSource, "__init__", other_base)
    with pytest.raises(ConfigError, match=r"differing: 0; hidden states part after layer 0; max \|delta logit\|"):
        convert_hf_to_megatron(folder, tmp_path / "megatron")


@pytest.mark.parametrize("pattern", ["*-*-*-", "G-+-M-*-"])
def test_a_written_folder_that_reads_as_another_model_is_not_put_in_place(pattern, one_rank, tmp_path, monkeypatch):
    save_model(build_model(tiny_config(pattern)), tmp_path / "megatron")
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "right")
    written = to_hf.hf_config_from_model
    monkeypatch.setattr(to_hf, "hf_config_from_model", lambda c, *rest: written(c.replace(layernorm_epsilon=0.1), *rest))
    with pytest.raises(ConfigError, match=NOTHING_WRITTEN):
        convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron", "right"]


@pytest.mark.parametrize("kind", ["plain", "tied", "fp8", "hybrid", "experts", "experts fp8"])
def test_layer_by_layer_equals_whole(kind, one_rank, tmp_path, monkeypatch):
    if kind == "hybrid":
        save_model(build_model(tiny_config()), tmp_path / "source")
        convert_megatron_to_hf(tmp_path / "source", tmp_path / "hf")
    else:
        family = "qwen3_moe" if "experts" in kind else "qwen3"
        changes = {"moe_intermediate_size": 32} if kind == "experts fp8" else {}  # whole blocks
        tiny_hf_model(family, kind == "tied", **changes).bfloat16().save_pretrained(tmp_path / "hf")
    if "fp8" in kind:
        block = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
        quantise_folder(tmp_path / "hf", float8("weight_scale_inv", (16, 16), torch.bfloat16), block)
    convert_hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    whole = verify_conversion(tmp_path / "hf", tmp_path / "megatron")
    monkeypatch.setattr(oracle_module, "LAYERWISE_PARAMETERS", 0)
    source = open_source(tmp_path / "hf")
    with open_oracle(source, tmp_path / "hf") as oracle:
        assert all(p.device.type == "meta" for p in oracle.model.parameters())
    parts = verify_conversion(tmp_path / "hf", tmp_path / "megatron")
    assert parts.oracle == whole.oracle + ", layer by layer from the disk" and parts.ok
    assert parts.tensors == whole.tensors and parts.max_logit_difference == whole.max_logit_difference


def test_a_bfloat16_model_compares_in_float32(one_rank, folder, tmp_path):
    convert_hf_to_megatron(folder, tmp_path / "megatron")
    result = verify_conversion(folder, tmp_path / "megatron")
    assert result.ok and result.max_logit_difference < 2e-5 and max(result.layer_differences) < 2e-6


def test_weights_that_transformers_starts_at_random_are_no_oracle(one_rank, folder, tmp_path):
    """A folder that lost a tensor after it was opened."""
    source = SafetensorsSource(folder)
    state = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    del state["model.norm.weight"]
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, state_dict=state)
    with pytest.raises(ConfigError, match="transformers finds no model.norm.weight"), open_oracle(source, folder):
        pass


def test_cli_compares_unless_told_not_to(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(SafetensorsSource, "read", rounds)
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(folder), str(tmp_path / "megatron")])
    assert ended.value.code == 2 and not (tmp_path / "megatron").exists()
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(folder), str(tmp_path / "megatron"), "--no_verify"])
    assert ended.value.code == 0
    monkeypatch.undo()
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(folder), str(tmp_path / "megatron")])
    out = capsys.readouterr().out.lstrip()
    assert ended.value.code == 1 and out.startswith(
        "compared with transformers' own loading\ntensors compared: 36, differing: 1\n"
    )
    assert out.endswith("NOT verified\n")
