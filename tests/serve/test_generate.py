"""generate_text out of every kind of folder, with a real (tiny) tokenizer."""

import io
import json
import logging

import pytest
import tokenizers
import torch

from megatron_hylo.cli import main as cli
from megatron_hylo.config import ConfigError
from megatron_hylo.config.layouts import kv_bytes_per_token
from megatron_hylo.convert.open_model import open_model
from megatron_hylo.convert.to_megatron import convert_hf_to_megatron
from megatron_hylo.hf.quantised_hylo import keep_weights_in_fp8
from megatron_hylo.serve import generate
from megatron_hylo.serve.generate import generate_text
from megatron_hylo.serve.generate_batch import generate_texts
from tests.conftest import tiny_hf_model
from tests.hf.conftest import save_tokenizer, serve_config

PROMPT = "the quick brown fox"


@pytest.fixture
def folders(save_hybrid, tmp_path):
    """One hybrid as a Megatron folder and as an exported one, and its configuration."""
    config = serve_config("G+M*")
    save_hybrid(tmp_path, config)
    return tmp_path / "model", tmp_path / "hf", config


def test_megatron_and_exported_folder_give_the_same_text_and_numbers(folders):
    megatron, exported, config = folders
    results = []
    for folder in (megatron, exported):
        pieces = []
        result = generate_text(folder, PROMPT, max_new_tokens=20, on_text=pieces.append)
        assert "".join(pieces) == result.text != ""
        assert result.tokens_per_second > 0 and result.prefill_seconds > 0
        results.append(result)
    one, other = results
    assert (one.text, one.new_tokens, one.cache_bytes) == (other.text, other.new_tokens, other.cache_bytes)
    assert one.prompt_tokens == len(PROMPT) and one.decoded_by == "single kernels (no GPU)"
    assert one.kv_bytes_per_token == kv_bytes_per_token(config, bytes_per_element=4)


def test_8_bit_latents_take_a_byte_a_number_and_two_scales(folders):
    found = generate_text(folders[1], PROMPT, max_new_tokens=3, latents="fp8")
    whole = generate_text(folders[1], PROMPT, max_new_tokens=3)
    assert whole.kv_bytes_per_token - found.kv_bytes_per_token == (24 + 6) * 4 - (24 + 6 + 4)  # one MLA layer, fp32


def test_fp8_weights_give_the_text_of_the_rounded_model(folders):
    model, tokenizer = open_model(folders[1])
    keep_weights_in_fp8(model)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)[0, len(PROMPT) :]
    found = generate_text(folders[1], PROMPT, max_new_tokens=12, weights="fp8")
    assert found.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert found.text != generate_text(folders[1], PROMPT, max_new_tokens=12).text  # random weights: rounding changes words


def test_text_is_the_argmax_of_full_forwards(folders):
    model, tokenizer = open_model(folders[0])
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(10):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert generate_text(folders[1], PROMPT, max_new_tokens=10).text == tokenizer.decode(
        ids[0, len(PROMPT) :], skip_special_tokens=True
    )


def test_many_prompts_get_the_texts_that_each_gets_alone(folders, capsys):
    prompts = [PROMPT, "a", "the lazy dog and the hen and the cow " * 3, "over", "the end"]
    alone = [generate_text(folders[1], prompt, 9) for prompt in prompts]
    ends = []
    found = generate_texts(folders[1], prompts, 2, 9, on_result=lambda number, result: ends.append(number))
    assert sorted(ends) == [0, 1, 2, 3, 4] and all(result.tokens_per_second > 0 for result in found)
    for name in ("text", "prompt_tokens", "new_tokens", "cache_bytes", "kv_bytes_per_token", "decoded_by"):
        assert [getattr(x, name) for x in found] == [getattr(x, name) for x in alone], name
    lines = [json.dumps(prompt if number % 2 else {"prompt": prompt, "id": 3}) for number, prompt in enumerate(prompts)]
    with pytest.raises(SystemExit) as exit:
        cli.main(["generate", str(folders[1]), "\n".join(lines), "--batch", "8", "--max_new_tokens", "9"])
    captured = capsys.readouterr()
    printed = [json.loads(line) for line in captured.out.splitlines()]
    assert exit.value.code == 0 and f"5 prompts, {sum(x.new_tokens for x in alone)} new tokens" in captured.err
    printed.sort(key=lambda x: x["number"])
    assert [x.get("id") for x in printed] == [3, None, 3, None, 3]
    assert [(x["number"], x["prompt"], x["text"]) for x in printed] == [
        (i, p, x.text) for i, (p, x) in enumerate(zip(prompts, alone))
    ]
    for wrong, message in ((dict(latents="int4"), "no format of a cache"), (dict(batch=0), "batch >= 1")):
        with pytest.raises(ConfigError, match=message):
            generate_texts(folders[1], prompts, **wrong)
    texts = [generate_texts(folders[1], prompts, 3, 9, temperature=2.0, seed=seed)[2].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_prefill_in_pieces_changes_nothing(folders, monkeypatch):
    whole = generate_text(folders[1], PROMPT, max_new_tokens=10)
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 5)
    assert generate_text(folders[1], PROMPT, max_new_tokens=10).text == whole.text


@pytest.mark.parametrize("number", [0, 1], ids=["Megatron", "exported"])
def test_going_past_the_trained_length_is_said_once(folders, number, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # its own reminder would be seen
    longest = folders[2].max_position_embeddings
    prompt = "a" * (longest - 2)
    generate_text(folders[number], prompt, max_new_tokens=2)
    assert not [text for text in caplog.messages if "trained for" in text]
    generate_text(folders[number], prompt, max_new_tokens=9)
    (text,) = (text for text in caplog.messages if "trained for" in text or "maximum length" in text)
    assert f"was trained for {longest} tokens; the prompt's {longest - 2} and 9 new ones go past it" in text


def test_sampling_depends_on_the_seed_alone(folders):
    texts = [generate_text(folders[1], PROMPT, 20, temperature=2.0, top_p=0.95, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_penalty_on_repetition_leaves_no_token_twice(folders):
    model, tokenizer = open_model(folders[1])
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    plain = model.generate(ids, max_new_tokens=60, do_sample=False)[0].tolist()
    found = model.generate(ids, max_new_tokens=60, do_sample=False, repetition_penalty=1e9)[0, len(PROMPT) :].tolist()
    assert len(set(found)) == len(found) and found != plain[len(PROMPT) :]
    ours = generate_text(folders[1], PROMPT, max_new_tokens=60, repetition_penalty=1e9)
    assert ours.text == tokenizer.decode(found[: ours.new_tokens], skip_special_tokens=True)  # the tokenizer's end may come


def test_generation_ends_with_the_end_of_sequence_token(folders):
    model, tokenizer = open_model(folders[1])
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    continuation = model.generate(ids, max_new_tokens=10, do_sample=False)[0, len(PROMPT) :].tolist()
    (folders[1] / "manifest.json").unlink()  # the export is changed on purpose
    (folders[1] / "generation_config.json").write_text(json.dumps({"eos_token_id": continuation[6]}))
    result = generate_text(folders[1], PROMPT, max_new_tokens=10)
    assert result.new_tokens == continuation.index(continuation[6]) + 1


def test_chat_template_is_applied(folders):
    chat = generate_text(folders[1], PROMPT, max_new_tokens=5, chat=True)
    assert chat.prompt_tokens == len(PROMPT + " answer")
    (folders[1] / "manifest.json").unlink()  # the export is changed on purpose
    file = folders[1] / "chat_template.jinja"
    file.write_text("{{ raise_exception('only for machines') }}")
    with pytest.raises(ConfigError, match="chat template cannot be used: only for machines"):
        generate_text(folders[1], PROMPT, chat=True)


def test_a_prompt_of_the_standard_input_is_that_of_the_command_line(folders, capsys, monkeypatch):
    def printed(prompt: str) -> str:
        with pytest.raises(SystemExit) as exit:
            cli.main(["generate", str(folders[1]), prompt, "--max_new_tokens", "5"])
        return f"{exit.value.code} {capsys.readouterr().out.splitlines()[0]}"

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode("utf-8-sig"))))
    assert printed("-") == printed(PROMPT) and printed(PROMPT).startswith(f"0 {PROMPT}")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    with pytest.raises(SystemExit) as exit:
        cli.main(["generate", str(folders[1]), "-"])
    captured = capsys.readouterr()
    assert exit.value.code == 2 and "error: the prompt is not text" in captured.err and not captured.out


def test_teacher_folders(one_rank, tmp_path):
    tiny_hf_model("qwen3").save_pretrained(tmp_path / "hf")
    save_tokenizer(tmp_path / "hf")
    convert_hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    one, other = (generate_text(tmp_path / name, PROMPT, max_new_tokens=12) for name in ("hf", "megatron"))
    assert (one.text, one.kv_bytes_per_token, one.cache_bytes) == (other.text, other.kv_bytes_per_token, other.cache_bytes)
    assert one.kv_bytes_per_token == 3 * 2 * 2 * 16 * 4  # layers, key and value, KV heads, head size, fp32
    with pytest.raises(ConfigError, match="has no latents to keep in fp8"):
        generate_text(tmp_path / "hf", PROMPT, latents="fp8")
    with pytest.raises(ConfigError, match="whose weights are not kept in fp8 here; leave it out"):
        generate_text(tmp_path / "hf", PROMPT, weights="fp8")
    with pytest.raises(ConfigError, match="only hybrids decode many prompts here; give it one at a time"):
        generate_texts(tmp_path / "hf", [PROMPT])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens >= 1"),
        ({"temperature": -1.0}, "temperature >= 0"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty > 0"),
        ({"prompt": ""}, "prompt is empty"),
        ({"latents": "int4"}, "latents 'int4' is no format of a cache"),
        ({"weights": "int4"}, "weights 'int4' is no format that weights are kept in; use 'fp8'"),
        ({"prompt": "caf\udce9"}, "prompt is not text.*at character 3"),
    ],
)
def test_bad_settings(folders, changes, message):
    with pytest.raises(ConfigError, match=message):
        generate_text(folders[1], **({"prompt": PROMPT} | changes))


def test_a_cache_larger_than_the_memory_is_refused_where_it_would_grow_too(folders):
    with pytest.raises(
        ConfigError, match=r"a cache of 1,000,000,000,019 tokens for 1 sequences takes .* use fewer sequences or"
    ):
        generate_text(folders[1], PROMPT, max_new_tokens=10**12)


def test_folder_without_tokenizer(folders):
    (folders[1] / "manifest.json").unlink()  # the export is changed on purpose
    (folders[1] / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        generate_text(folders[1], PROMPT)
    with pytest.raises(ConfigError, match="has no config.json"):
        generate_text(folders[1].parent, PROMPT)


def test_an_empty_prompt_is_one_where_the_tokenizer_begins_a_text_or_a_template_holds_it(folders):
    """Llama's tokenizer begins every text with a token, from which a model goes on without a word of the user's."""
    file = folders[1] / "tokenizer.json"
    (folders[1] / "manifest.json").unlink()  # the export is changed on purpose
    assert generate_text(folders[1], "", max_new_tokens=2, chat=True).prompt_tokens == len(" answer")
    core = tokenizers.Tokenizer.from_file(str(file))
    core.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    core.save(str(file))
    assert generate_text(folders[1], "", max_new_tokens=2).prompt_tokens == 1


def without_end(folder):
    """Let a random model never end its text."""
    (folder / "manifest.json").unlink()  # the export is changed on purpose
    for name, key in (("config", "eos_token_id"), ("generation_config", "eos_token_id"), ("tokenizer_config", "eos_token")):
        file = folder / f"{name}.json"
        if file.is_file():
            file.write_text(json.dumps(json.loads(file.read_text()) | {key: None}))


def test_without_an_end_token_as_many_tokens_come_as_were_asked_for(folders):
    without_end(folders[1])
    for seed in range(4):
        assert generate_text(folders[1], PROMPT, 64, temperature=0.7 * seed, seed=seed).new_tokens == 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_captured_graph_generates_the_text_of_single_kernels(folders):
    without_end(folders[1])
    for settings in (dict(), dict(latents="fp8"), dict(temperature=0.7, repetition_penalty=1.1)):
        eager, graph = (generate_text(folders[1], PROMPT, 64, cuda_graphs=by_graph, **settings) for by_graph in (False, True))
        assert (eager.text, eager.decoded_by) == (graph.text, "single kernels (cuda_graphs is false)")
        assert graph.decoded_by == "a CUDA graph" and graph.cache_bytes == eager.cache_bytes
