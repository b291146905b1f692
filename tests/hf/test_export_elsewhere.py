"""Exported folders as a stranger uses them: a fresh process, neither this project nor Megatron, transformers 4 and 5."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers

from megatron_hylo.convert.hf_config import TRANSFORMERS_VERSIONS
from megatron_hylo.convert.portable_tokenizer import make_tokenizer_portable
from megatron_hylo.data.load_tokenizer import load_transformers_tokenizer
from megatron_hylo.hf import HyloForCausalLM, configuration_hylo
from tests.hf.conftest import export, random_megatron_model, save_tokenizer, serve_config
from tests.hf.test_export import CASES

PROMPTS = ["the quick brown fox", "a", "jumps over"]
ELSEWHERE = """
import builtins, logging, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "megatron_hylo"):
            raise ImportError(name + " is not here")

sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoModelForSequenceClassification
from transformers import AutoModelForTokenClassification, AutoTokenizer, __version__, pipeline

folder, output = sys.argv[1:]
asked = []
builtins.input = lambda text: asked.append(text) or "n"
tokenizer = AutoTokenizer.from_pretrained(folder, **({} if __version__ < "5" else {"trust_remote_code": False}))
tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
again = output + ".again"
model.save_pretrained(again)
prompts, found = ["the quick brown fox", "a", "jumps over"], {}
batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
greedy = dict(max_new_tokens=6, do_sample=False)
with torch.no_grad():
    ids = torch.arange(150).view(2, 75)
    found["logits"] = model(ids).logits
    found["again"] = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True, dtype=torch.float32)(ids).logits
    placed = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, device_map="auto")
    found["placed"] = placed(ids).logits
    base = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    found["base"] = model.lm_head(base(ids).last_hidden_state)
    for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering):
        head = auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, num_labels=2, pad_token_id=159).eval()
        out, hidden = head(ids), head.model(ids).last_hidden_state
        scores = torch.stack([out.start_logits, out.end_logits], -1) if hasattr(out, "start_logits") else out.logits
        score = head.qa_outputs if hasattr(head, "qa_outputs") else head.score
        whole = score(hidden[:, -1] if scores.dim() == 2 else hidden)
        assert scores.std() > 0 and torch.allclose(scores, whole, atol=1e-5), auto
        found[auto.__name__] = model.lm_head(hidden)
    embeddings = model.get_input_embeddings()(ids)
    found["embeddings"] = model(inputs_embeds=embeddings).logits
    found["text of embeddings"] = model.generate(inputs_embeds=embeddings, **greedy)
    found["padded"] = model(**batch).logits
    for name, settings in {"greedy": {}, "cut": {"prefill_chunk_size": 4}, "beams": {"num_beams": 3}}.items():
        found[name] = model.generate(**batch, **greedy, **settings)
    torch.manual_seed(0)
    assistant = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assistant.generation_config.num_assistant_tokens = 3
    assistant.model.layers[0].mlp.up_proj.weight.mul_(0.9)
    one = dict(input_ids=ids[:1, :20], **greedy)
    found["assisted"] = model.generate(**one, assistant_model=assistant), model.generate(**one)
    found["sampled"] = model.generate(**batch, max_new_tokens=6, do_sample=True, num_return_sequences=2)
    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
found["fp32"] = sorted(name for name, p in half.named_parameters() if p.dtype == torch.float32)
tokenizer.padding_side = "left"
texts = pipeline("text-generation", model=model, tokenizer=tokenizer)(prompts, batch_size=3, return_full_text=False, **greedy)
found["turn"] = dict(tokenizer("the <|turn|> fox"))
found["texts"] = [text[0]["generated_text"] for text in texts]
found["ids"] = {key: value.tolist() for key, value in batch.items()}
model.train().gradient_checkpointing_enable()
found["loss"] = model(ids, labels=ids).loss.detach()
found["messages"] = []
for call in (lambda: model(ids, attention_mask=torch.ones(2, 1, 75, 75)),
             lambda: model.eval().generate(torch.tensor([[5, 1]]), attention_mask=torch.tensor([[1, 0]]))):
    try:
        call()
    except ValueError as error:
        found["messages"].append(str(error))
class Said(logging.Handler):
    def emit(self, record):
        found["said"].append(record.getMessage())

found["said"] = []
for name in ("", "transformers"):
    logging.getLogger(name).addHandler(Said(logging.WARNING))
model.config.max_position_embeddings = 22
for _ in range(2):
    model.generate(**one, pad_token_id=0)
assert not asked, asked
assert not [name for name in sys.modules if name.split(".")[0] in ("megatron", "megatron_hylo")]
torch.save(found, output)
print(__version__)
"""


def run_here(program: str, *arguments: object) -> str:
    """Run Python code in a process of its own with the transformers that is installed; its stdout."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(params=["4", "5"])
def elsewhere(request):
    """(run, version): each end of the range of transformers versions."""
    run = run_here if request.param == "5" else request.getfixturevalue("transformers4")
    return run, TRANSFORMERS_VERSIONS[request.param == "5"]


@torch.no_grad()
def test_a_stranger_gets_the_megatron_models_logits_and_the_full_forwards_text(one_rank, elsewhere, tmp_path, monkeypatch):
    run, version = elsewhere
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    save_tokenizer(tmp_path / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")  # as transformers 5 does
    megatron = random_megatron_model(CASES["G+M* experts, q/k-norm, yarn"])
    export(megatron, tmp_path, tmp_path / "tokenizer")
    assert run(ELSEWHERE, tmp_path / "hf", tmp_path / "found.pt").split() == [version]
    found = torch.load(tmp_path / "found.pt")

    ids = torch.arange(150).view(2, 75)
    expected = megatron.logits(megatron(ids.to(one_rank))).cpu()
    assert expected.std() > 0.3
    heads = [f"AutoModelFor{kind}" for kind in ("SequenceClassification", "TokenClassification", "QuestionAnswering")]
    for name in ("logits", "again", "placed", "base", "embeddings", *heads):
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-4, msg=name)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()  # the project's class needs no trust
    assert type(model) is HyloForCausalLM
    torch.testing.assert_close(found["loss"], model(ids, labels=ids).loss)
    assert found["fp32"] == sorted(n for n, _ in model.named_parameters() if n.endswith(("A_log", "dt_bias", ".D")))

    (said,) = (text for text in found["said"] if " 22" in text or "maximum length" in text)
    assert said.startswith(f"{tmp_path / 'hf'} was trained for 22 tokens; the text's 23 go past it: nothing is cut off")
    assert found["turn"] == dict(tokenizer("the <|turn|> fox")) and len(found["turn"]["input_ids"]) == 9
    alone = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    assert list(found["ids"]) == ["input_ids", "attention_mask"]
    for row, prompt in zip(found["ids"]["input_ids"], alone):
        assert row[-prompt.shape[1] :] == prompt[0].tolist()
    width, settings = max(x.shape[1] for x in alone), dict(max_new_tokens=6, do_sample=False)
    for row, prompt in enumerate(alone):
        torch.testing.assert_close(found["padded"][row, -prompt.shape[1] :], model(prompt).logits[0], rtol=0, atol=1e-4)
        text = greedy(model, prompt, 6)
        assert tokenizer.decode(text, skip_special_tokens=True) == found["texts"][row]
        assert found["greedy"][row, width:].tolist()[: len(text)] == text
        assert found["cut"][row, width:].tolist()[: len(text)] == text
        beams = model.generate(prompt, num_beams=3, **settings)[0, prompt.shape[1] :].tolist()
        assert found["beams"][row, width:].tolist()[: len(beams)] == beams
    assert torch.equal(*found["assisted"])
    assert torch.equal(found["text of embeddings"], model.generate(ids, **settings)[:, 75:])
    assert len(found["sampled"]) == 6 and not torch.equal(found["sampled"][0], found["sampled"][1])
    refusals = ("4 dimensions", "pad on the left")
    for words, message in zip(refusals, found["messages"], strict=True):
        assert words in message


def greedy(model: HyloForCausalLM, prompt: torch.Tensor, tokens: int) -> list[int]:
    """The most likely next tokens by full forward passes, up to the end-of-sequence token."""
    ids, end = prompt, model.generation_config.eos_token_id
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        if end is not None and ids[0, -1] == end:
            break
    return ids[0, prompt.shape[1] :].tolist()


def test_versions_that_do_not_work_are_refused_in_a_sentence(monkeypatch):
    assert configuration_hylo.TRANSFORMERS_VERSIONS == TRANSFORMERS_VERSIONS  # a file that travels alone states them again
    for version in ("4.56.2", "3.5.1", "6.0.0", "6.0.0.dev0"):
        message = f"need transformers 4.57 or later, before 6, but {version} is installed; pip install 'transformers>=4.57,<6'"
        with pytest.raises(ImportError, match=message):
            configuration_hylo.check_transformers(version)
    warnings = []
    monkeypatch.setattr(configuration_hylo.logger, "warning", lambda text, *values: warnings.append(text % values))
    for version in (*TRANSFORMERS_VERSIONS, "4.57.6", "5.0.0rc1", "5.99.0"):
        configuration_hylo.check_transformers(version)
    assert len(warnings) == 1 and "tested with transformers up to 5.17.0; 5.99.0 is installed" in warnings[0]


def test_a_portable_tokenizer_is_the_one_it_was(tmp_path):
    save_tokenizer(tmp_path)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    saved.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    saved.save_pretrained(tmp_path)
    make_tokenizer_portable(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.all_special_tokens == saved.all_special_tokens and again.chat_template == saved.chat_template
    assert again.get_vocab() == saved.get_vocab() and dict(again("the <|turn|> fox")) == dict(saved("the <|turn|> fox"))
    settings = (tmp_path / "tokenizer_config.json").read_text()
    make_tokenizer_portable(tmp_path)  # nothing is left to do
    assert (tmp_path / "tokenizer_config.json").read_text() == settings
    (tmp_path / "tokenizer_config.json").unlink()
    make_tokenizer_portable(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert dict(transformers.AutoTokenizer.from_pretrained(tmp_path)("the <|turn|> fox")) == dict(saved("the <|turn|> fox"))


def test_our_verbs_read_an_exports_tokenizer_without_asking_for_the_models_code(one_rank, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda text: pytest.fail(f"asked: {text}"))
    monkeypatch.delitem(transformers.CONFIG_MAPPING._extra_content, "hylo")  # as where the classes were not imported
    save_tokenizer(tmp_path / "tokenizer")
    export(random_megatron_model(serve_config("G+")), tmp_path, tmp_path / "tokenizer")
    found, expected = (load_transformers_tokenizer(tmp_path / name)("the fox").input_ids for name in ("hf", "tokenizer"))
    assert found == expected
