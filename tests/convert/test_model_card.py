"""Model cards: parsed by huggingface_hub, against the folders that they describe."""

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from megatron_hylo.config.layouts import get_layout
from megatron_hylo.config.train import OptimizerSettings, TrainConfig
from megatron_hylo.convert.model_card import CardFacts, model_card
from megatron_hylo.convert.to_hf import convert_megatron_to_hf
from megatron_hylo.eval.results import EvalResult, Score
from megatron_hylo.models.checkpoint import save_model
from megatron_hylo.models.hylo_model import build_model
from tests.hf.conftest import serve_config

SCORE = Score("ruler", "niah|1", "exact", 0.75, 0.05, 40, length=4096)


def test_an_exports_card_says_what_was_measured_and_how_it_was_made(one_rank, tmp_path):
    config = serve_config("G+M*")
    model = build_model(config, backend="local")
    source = {"path": "/secret/hub/models--org--base/snapshots/0123", "files": {"config.json": "f"}}
    converted = {"verb": "convert", "converted_from": "base.Q4_1.gguf", "inputs": {"source": source}}
    inputs = {"teacher": {"path": "/secret/teacher", "provenance": converted}}
    trained = {"verb": "train", "stage": "distil", "train_steps": 36, "seed": 7, "tokens": 4608, "sequence_length": 128}
    trained["recipe"] = {"optimizer.mixer_lr": 7e-4, "recall.share": 0.2, "checkpoint.keep": 1}
    trained["inputs"] = inputs | {"data": {"path": "/secret/corpus", "content_sha256": "abc"}}
    save_model(model, tmp_path / "model", None, trained)
    by_depth = replace(SCORE, depth=0.5, value=0.1)
    perplexity = Score("ppl", "heldout", "perplexity", 7.0, None, 3, length=2048)
    about = {"command": "hylo eval model", "commit": "1234567"}
    measured = EvalResult({"name": "model"}, about, [SCORE, by_depth]).to_dict()
    seen = EvalResult({"name": "model"}, about | {"settings": {"data": "/secret/corpus"}}, [replace(perplexity, value=6.0)])
    other = EvalResult({"name": "model"}, about | {"settings": {"data": "/secret/unseen"}}, [perplexity]).to_dict()
    facts = CardFacts([measured, other, seen.to_dict()], "apache-2.0", datasets=["org/text"])
    convert_megatron_to_hf(tmp_path / "model", tmp_path / "out", verify=False, facts=facts)
    text = (tmp_path / "out" / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.library_name, data.license, data.pipeline_tag) == ("transformers", "apache-2.0", "text-generation")
    assert data.eval_results[0].metric_value == 0.75 and data.eval_results[0].dataset_name == "ruler niah|1 4096"
    assert "| ruler | niah\\|1 |  | 4,096 | exact | 0.75 ± 0.05 | 40 |" in text and "`hylo eval model`, commit 1234567" in text
    assert "| ppl | heldout | unseen | 2,048 | perplexity | 7 | 3 |" in text and "0.1" not in text.split("## Results")[1]
    names = {(result.dataset_name, result.metric_value) for result in data.eval_results}
    assert names == {("ruler niah|1 4096", 0.75), ("ppl heldout 2048 unseen", 7.0), ("ppl heldout 2048 corpus", 6.0)}
    assert "dequantised from `base.Q4_1.gguf`, so they are not the original ones" in text
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters, 4 layers: 1 " in text and "(`G+M*`)" in text
    # a latent of 24 and a rotary key of 6, keys and values of 2 x 16, 2 bytes each; attention alone 4 x 2 x 32 x 2
    assert "takes 188 bytes a token in bf16, 36.7% of the 512" in text
    steps = [line for line in text.splitlines() if line.startswith(("| convert", "| train", "| export"))]
    assert [line.split(" |")[0] for line in steps] == ["| convert", "| train", "| export"]
    assert "stage distil; seed 7; teacher `teacher`; data `corpus`" in steps[1]
    assert "| distil | 4,608 | 128 | 36 | optimizer.mixer_lr 0.0007; recall.share 0.2; seed 7 |" in text
    assert "| `+` MLA | 1 | " in text and "kv_lora_rank 24" in text and "| 60 |" in text, "a latent of 24 and 6, 2 bytes each"
    assert data.base_model == "org/base" and data.datasets == ["org/text"] and "gated-deltanet" in data.tags
    assert "[org/base](https://huggingface.co/org/base), whose licence and terms apply" in text
    assert "- `corpus` (SHA-256 of its tokens `abc`)" in text and "- 36 training steps followed" in text
    assert "trust_remote_code=True" in text and "/secret" not in text and str(tmp_path) not in text


def test_a_windowed_llama_is_a_model_of_ours_and_a_mistral_is_not():
    llama = serve_config("W*", attention_window=32)  # of 128 tokens: a layer keeps a quarter
    text = model_card("windowed", llama, 1000, {})
    assert "trust_remote_code=True" in text and "vllm serve" not in text
    assert "takes 160 bytes a token of a sequence of 128 in bf16, 62.5% of the 256" in text
    assert "| `W` windowed attention | 0 | attention_window 32 | 32 |" in text
    text = model_card("mistral", llama.replace(hybrid_layer_pattern="W-W-", model_family="mistral"), 1000, {})
    assert "trust_remote_code=True" not in text and "vllm serve" in text


@pytest.mark.parametrize("layout, sizes", [
    ("smollm2-135m-8mla22gdn-teacher", "1, 3"), ("smollm2-135m-8mla22gdn", "1, 3"), ("smollm2-135m-8mla22m2", "1, 3"),
    ("llama3.2-1b-4mla12gdn", "1, 2"), ("llama3.2-1b-4mla12m2", "1, 2, 4, 8"),
])  # fmt: skip
def test_a_card_names_the_tensor_parallel_sizes_that_divide_all_heads(layout, sizes):
    """SmolLM2-135M has 9 heads on 3 KV heads and Llama-3.2-1B 32 on 8; HyLo's Gated DeltaNet has 3 and 6 heads in them."""
    text = model_card("hybrid", get_layout(layout).config, 1000, {})
    assert f"tensor-parallel sizes that work: {sizes}." in text


def test_a_stages_row_names_its_optimizer_where_it_is_not_the_default():
    def row(**optimizer) -> str:
        settings = OptimizerSettings(lr=1e-3, **optimizer)
        config = TrainConfig("pretrain", "data", "run", scratch="base", optimizer=settings)
        step = {"verb": "train", "stage": "pretrain", "train_steps": 2, "seed": 7, "recipe": config.changed_settings()}
        return next(line for line in model_card("m", serve_config("**"), 1000, step).splitlines() if "| pretrain |" in line)

    assert (
        row(name="muon", use_distributed_optimizer=False)
        == "| pretrain |  |  | 2 | optimizer.name muon; optimizer.lr 0.001; seed 7 |"
    )
    assert row() == "| pretrain |  |  | 2 | optimizer.lr 0.001; seed 7 |"


def test_a_card_says_what_it_does_not_know():
    text = model_card("base", serve_config("**"), 1000, {})
    assert ModelCard(text).data.license is None and "None were given. `hylo eval`" in text
    assert "No training data is recorded" in text and "trust_remote_code=True" not in text and "Not stated." in text
