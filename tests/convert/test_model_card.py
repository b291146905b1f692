"""Model cards: parsed by huggingface_hub, against the folders that they describe."""

import math
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from megatron_hylo.config.layouts import get_layout
from megatron_hylo.config.train import OptimizerSettings, TrainConfig
from megatron_hylo.convert.model_card import CardFacts, has_chat_template, model_card
from megatron_hylo.convert.to_hf import convert_megatron_to_hf
from megatron_hylo.eval.results import EvalResult, Score
from megatron_hylo.hf import HyloConfig
from megatron_hylo.hf.cache_hylo import cache_nbytes
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
    trained["recipe"] = {
        "optimizer.mixer_lr": 7e-4,
        "recall.share": 0.2,
        "recall.cross_entropy": "answers",
        "checkpoint.keep": 1,
    }
    trained["inputs"] = inputs | {"data": {"path": "/secret/corpus", "content_sha256": "abc", "documents": 5, "tokens": 6000}}
    save_model(model, tmp_path / "model", None, trained)
    by_depth = replace(SCORE, depth=0.5, value=0.1)
    perplexity = Score("ppl", "heldout", "perplexity", 7.0, None, 3, length=2048)
    about = {"command": "hylo eval /secret/model", "commit": "1234567"}
    measured = EvalResult({"name": "model"}, about, [SCORE, by_depth]).to_dict()
    seen = EvalResult({"name": "model"}, about | {"settings": {"data": "/secret/corpus"}}, [replace(perplexity, value=6.0)])
    other = EvalResult({"name": "model"}, about | {"settings": {"data": "/secret/unseen"}}, [perplexity]).to_dict()
    facts = CardFacts([measured, other, seen.to_dict()], "apache-2.0", datasets=["org/text"])
    convert_megatron_to_hf(tmp_path / "model", tmp_path / "out", verify=False, facts=facts)
    text = (tmp_path / "out" / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.library_name, data.license, data.pipeline_tag) == ("transformers", "apache-2.0", "text-generation")
    assert data.eval_results[0].metric_value == 0.75 and data.eval_results[0].dataset_name == "ruler niah|1 4096"
    assert "| suite | task | text | metric | 2,048 tokens | 4,096 tokens | examples | notes |" in text
    assert "| ruler | niah\\|1 |  | exact |  | 0.75 ± 0.05 | 40 |" in text and "- `hylo eval model`, commit 1234567" in text
    assert "| ppl | heldout | unseen | perplexity | 7 |  | 3 |" in text and "0.1" not in text.split("## Results")[1]
    names = {(result.dataset_name, result.metric_value) for result in data.eval_results}
    assert names == {("ruler niah|1 4096", 0.75), ("ppl heldout 2048 unseen", 7.0), ("ppl heldout 2048 corpus", 6.0)}
    assert "dequantised from `base.Q4_1.gguf`, so they are not the original ones" in text
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters, 4 layers: 1 " in text and "(`G+M*`)" in text
    # a latent of 24 and a rotary key of 6, keys and values of 2 x 16, 2 bytes each; attention alone 4 x 2 x 32 x 2
    assert "takes 188 bytes a token in bf16, 36.7% of the 512" in text
    states = cache_nbytes(HyloConfig(hylo=config.to_dict()), 0, 2)
    assert f"and its recurrent states {states / 1e6:.1f} MB a sequence of any length." in text
    assert "A hybrid made from [org/base](https://huggingface.co/org/base) by [HyLo]" in text and "chat template" not in text
    steps = [line for line in text.splitlines() if line.startswith(("| 1", "| 2", "| 3"))]
    assert [line.split(" |")[0] for line in steps] == ["| 1 convert", "| 2 train", "| 3 export"]
    assert "stage distil; sequence_length 128; seed 7; teacher of step 1; data `corpus` |" in steps[1]
    assert "| 3 export | model of step 2 |" in text and "made-up facts, questions and answers take this part" in text
    recipe = "optimizer.mixer_lr 0.0007; recall.share 0.2; recall.cross_entropy answers; seed 7"
    assert f"| distil | 4,608 | 128 | 36 | {recipe} |" in text
    assert "facts and questions have no cross-entropy" in text
    assert "| `+` MLA | 1 | " in text and "kv_lora_rank 24" in text and "| 60 |" in text, "a latent of 24 and 6, 2 bytes each"
    assert data.base_model == "org/base" and data.datasets == ["org/text"] and "gated-deltanet" in data.tags
    assert "[org/base](https://huggingface.co/org/base), whose licence and terms apply" in text
    assert (
        "- `corpus` (5 documents of 6,000 tokens, SHA-256 of its tokens `abc`)" in text
        and "- 36 training steps followed" in text
    )
    assert "trust_remote_code=True" in text and "/secret" not in text and str(tmp_path) not in text


def test_scores_of_several_lengths_share_a_row():
    """All figures of a long-context model are in sight, each once, whatever lengths they were measured at."""
    scores = [replace(SCORE, length=1024 * 2**i, value=i / 8, stderr=None, note="cut" if i == 6 else "") for i in range(7)]
    bare = replace(SCORE, suite="commonsense", task="piqa", length=None, examples=500)
    runs = [{"command": "hylo eval '/a/b/m' --lengths [1,2] --out runs/x/y", "version": "0.2", "devices": ["GPU"] * 2}, {}]
    results = [EvalResult({}, runs[0], scores).to_dict(), EvalResult({}, runs[1], [scores[0], bare]).to_dict()]
    results.append(EvalResult({}, runs[1], [replace(scores[1], value=0.9)]).to_dict())
    results += [EvalResult({}, runs[1], [replace(SCORE, task="none", value=math.nan, stderr=None)]).to_dict()] * 2
    text = model_card("m", serve_config("G+"), 1000, {}, CardFacts(results)).split("## Results")[1]
    assert "| ruler | niah\\|1 |  | exact | 0 | 0.125 | 0.25 | 0.375 | 0.5 | 0.625 | 0.75 | 40 | 65,536: cut |" in text
    assert "| suite | task | text | metric | value | examples | notes |" in text
    assert "| commonsense | piqa |  | exact | 0.75 ± 0.05 | 500 |  |" in text and text.count("| ruler | niah") == 2
    assert text.count("| ruler | none |  | exact |  |  | nan |") == 1, "a number that is not equal to itself"
    high = EvalResult(
        {}, runs[1], [replace(SCORE, suite="ppl", value=v, stderr=None, length=n) for v, n in ((999.7, 1), (12345.6, 2))]
    )
    assert "| 1,000 | 12,346 | 40 |" in model_card("m", serve_config("G+"), 1000, {}, CardFacts([high.to_dict()]))
    assert "| ruler | niah\\|1 |  | exact |  | 0.9 |  |  |  |  |  | 40 |  |" in text, "another figure of one length"
    assert "- `hylo eval 'm' --lengths [1,2] --out runs/x/y`, version 0.2, GPU\n" in text and "None" not in text
    assert text.split("Measured by:")[1].split("## Limits")[0].count("- ") == 1, "runs without a command have no line"


def test_a_chat_models_card_shows_how_to_chat(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert not has_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert has_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert has_chat_template(tmp_path)
    text = model_card("m", serve_config("G+"), 1000, {}, has_chat=True)
    assert "tokenizer.apply_chat_template(turns, add_generation_prompt=True" in text and text.count("```") == 4


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
