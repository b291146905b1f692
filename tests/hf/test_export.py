"""Exported folders against the Megatron model, and loaded where neither this project nor Megatron can be imported."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_hylo.config import RopeScaling
from megatron_hylo.convert.to_hf import write_hf_folder
from megatron_hylo.hf import HyloForCausalLM, export
from megatron_hylo.hf.export import copy_modelling_code
from megatron_hylo.models.hylo_model import build_model
from tests.hf.conftest import ALIGNED, YARN, serve_config
from tests.kernels.compare import relative_error

CASES = {
    "+": serve_config("++"),
    "M": serve_config("MM"),
    "G": serve_config("GG"),
    "G+M*": serve_config("G+M*"),
    "G+M* q/k-norm, yarn": serve_config("G+M*", qk_layernorm=True, mla_rope_scaling=RopeScaling(**YARN)),
    "G+M* tied": serve_config("G+M*", untie_embeddings_and_output_weights=False),
    **{name: serve_config("G+*+", **settings) for name, settings in ALIGNED.items()},
}

LOAD_ELSEWHERE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "megatron_hylo"):
            raise ImportError(name + " is not here")

sys.meta_path.insert(0, Absent())
import torch, transformers
folder, ids, output = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
with torch.no_grad():
    ids = torch.load(ids)
    torch.save((model(ids).logits, model.generate(ids[:, :9], max_new_tokens=8, do_sample=False)), output)
assert not [name for name in sys.modules if name.split(".")[0] in ("megatron", "megatron_hylo")]
"""


def exported(config, folder):
    """A random Megatron model, every parameter moved off its trivial start, and its exported folder."""
    model = build_model(config, backend="local").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("_proj.bias"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 2:
                parameter.normal_(0, 0.2)
    folder.mkdir()
    write_hf_folder(model, folder, tokenizer=None)
    return model


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
@torch.no_grad()
def test_logits_equal_the_megatron_models(config, one_rank, tmp_path, ids):
    megatron = exported(config, tmp_path / "hf")
    model = HyloForCausalLM.from_pretrained(tmp_path / "hf").eval()
    expected = megatron.logits(megatron(ids.to(one_rank))).cpu()
    assert expected.std() > 0.3
    logits = model(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert relative_error(logits, expected) < 1e-5


@torch.no_grad()
def test_exported_folder_needs_nothing_of_ours(one_rank, tmp_path, ids):
    exported(CASES["G+M* q/k-norm, yarn"], tmp_path / "hf")
    model = HyloForCausalLM.from_pretrained(tmp_path / "hf").eval()
    torch.save(ids, tmp_path / "ids.pt")
    (tmp_path / "empty").mkdir()
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = [str(tmp_path / name) for name in ("hf", "ids.pt", "out.pt")]
    result = subprocess.run([sys.executable, "-c", LOAD_ELSEWHERE, *arguments], env=environment, cwd=tmp_path / "empty",
                            capture_output=True, text=True, timeout=300)  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    logits, generated = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-6)
    assert torch.equal(generated, model.generate(ids[:, :9], max_new_tokens=8, do_sample=False))


def test_all_files_that_are_imported_are_copied(tmp_path):
    names = {path.name for path in copy_modelling_code(tmp_path)}
    assert names == {path.name for path in tmp_path.iterdir()}
    kernels = {"attention.py", "attention_after_prefix.py", "causal_conv1d.py", "delta_rule_chain.py", "delta_rule_states.py",
               "gated_delta_rule.py", "norm.py", "registry.py", "rope.py", "ssd.py", "tuned.py"}  # fmt: skip
    assert names == {"modeling_hylo.py", "configuration_hylo.py", "cache_hylo.py"} | kernels


def test_code_that_needs_more_of_ours_than_kernels_is_not_exported(tmp_path, monkeypatch):
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    (tmp_path / "from" / "modeling_hylo.py").write_text("from megatron_hylo.config import ModelConfig\n")
    monkeypatch.setattr(export, "MODELLING", tmp_path / "from")
    with pytest.raises(RuntimeError, match="modeling_hylo.py cannot be exported.*megatron_hylo.config import ModelConfig"):
        copy_modelling_code(tmp_path / "to")
