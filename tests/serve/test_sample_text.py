"""Datasets that a model writes: tokens equal transformers' generation, a killed start goes on, a blend with one trains."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import megatron_hylo as mh
from megatron_hylo.config import ConfigError
from megatron_hylo.convert.open_model import hf_model, open_as_hybrid
from megatron_hylo.data.packed import DocumentStore, batches
from megatron_hylo.data.preprocess import build_dataset
from megatron_hylo.serve import sample_text as module
from megatron_hylo.serve.sample_text import sample_text
from megatron_hylo.serve.text_prompts import Prompts
from megatron_hylo.serve.text_sampler import choose_tokens, repetition, sample_documents
from megatron_hylo.train import data_loader
from tests.conftest import tiny_hf_model, uneven_model
from tests.data.conftest import END, make_documents, tokenizer  # noqa: F401

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def teacher(tmp_path, tokenizer):  # noqa: F811
    """A tiny Llama with a tokenizer, as a Hugging Face folder."""
    torch.manual_seed(1)
    tiny_hf_model("llama", vocab_size=310).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def starts(tmp_path, tokenizer):  # noqa: F811
    """A dataset whose documents' beginnings are prompts."""
    build_dataset(make_documents(40), tokenizer, tmp_path / "starts", 0.2)
    return tmp_path / "starts"


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("pattern", ["llama", "*-G-+-M-K-"])
def test_greedy_documents_match_transformers_generate(pattern, teacher, starts, one_rank, tokenizer):  # noqa: F811
    """Rows that begin anew many times, in lockstep, write what each prompt alone is continued with; linear layers forget."""
    model, _ = open_as_hybrid(teacher)
    if pattern == "llama":
        oracle = tiny_hf_model("llama", vocab_size=310).from_pretrained(teacher)
    else:
        model = oracle = hf_model(uneven_model(pattern, vocab_size=310).float()).eval()
    ends = list(range(2, 310, 9))
    prompts = Prompts(tokenizer, ends, 0, starts=DocumentStore(starts / "train"), starts_share=1.0, start_tokens=5)
    drafts = list(sample_documents(model, prompts, 6, 60, 0.0, 1.0, 310, (7,)))
    complete = [draft for draft in drafts if draft.ended]
    assert len(complete) >= 6 and len({tuple(d.ids) for d in drafts}) > 6
    for draft in drafts:
        if (new := len(draft.ids) - draft.given) == 0:
            continue
        settings = GenerationConfig(max_new_tokens=new + draft.ended, do_sample=False, eos_token_id=ends, pad_token_id=0)
        ids = torch.tensor([[0, *draft.ids[:5]]])
        found = oracle.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[0].tolist()
        assert found[1 : 1 + len(draft.ids)] == draft.ids and (found[-1] in ends) == draft.ended


def test_chats_are_written_turn_by_turn(teacher, one_rank, tokenizer):  # noqa: F811
    """The template's pieces stand around what was sampled, and were read: the answer is the greedy one to all before it."""
    tokenizer.chat_template = TEMPLATE
    try:
        model, _ = open_as_hybrid(teacher)
        ends = [1, *range(2, 310, 29)]
        prompts = Prompts(tokenizer, ends, 0, chat_share=1.0)
        drafts = list(sample_documents(model, prompts, 4, 120, 1.0, 1.0, 300, (3,)))
        greedy = list(sample_documents(model, prompts, 1, 120, 0.0, 1.0, 310, (3,)))[0]
    finally:
        tokenizer.chat_template = None
    texts = [tokenizer.decode(draft.ids) for draft in drafts if draft.ended]
    assert texts and len(set(texts)) == len(texts)
    middle = "<|im_end|>\n<|im_start|>assistant\n"
    for text in texts:
        assert text.startswith("<|im_start|>user\n") and text.count(middle) == 1
        assert text.endswith("<|im_end|>\n") and text.count("<|im_end|>") == 2
    assert greedy.ended and prompts.chat is not None
    between = prompts.chat.middle
    answer = next(i for i in range(len(greedy.ids)) if greedy.ids[i - len(between) : i] == between)
    ids = torch.tensor([[0, *greedy.ids[:answer]]])
    settings = GenerationConfig(max_new_tokens=60, do_sample=False, eos_token_id=ends, pad_token_id=0)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[0].tolist()
    assert found[1:-1] == greedy.ids[: -len(prompts.chat.tail)] and len(found) > answer + 2, (answer, len(found))


def test_sampling_matches_the_nucleus_by_hand():
    """Tokens outside never come; the others come in proportion to their probabilities, warmer where the temperature is."""
    p = torch.tensor([0.4, 0.05, 0.3, 0.15, 0.1])
    generator = torch.Generator().manual_seed(0)
    for top_p, temperature, kept in ((0.8, 1.0, [0, 2, 3]), (0.7, 2.0, [0, 2, 3]), (0.3, 1.0, [0]), (1.0, 1.0, range(5))):
        found = choose_tokens(p.log().expand(40_000, 5), temperature, top_p, generator).bincount(minlength=5) / 40_000
        wanted = torch.zeros(5)
        wanted[list(kept)] = p[list(kept)] ** (1 / temperature)
        torch.testing.assert_close(found, wanted / wanted.sum(), atol=0.01, rtol=0)
    assert choose_tokens(p.log()[None], 0.0, 1.0).tolist() == [0]


def test_a_stopped_start_goes_on_and_makes_the_same_bytes(teacher, starts, tmp_path, monkeypatch):
    """The shards that were done are not sampled again, and what was written behind them is not kept."""
    settings = dict(tokens=900, length=96, batch_size=3, starts=starts, start_tokens=9, heldout_fraction=0.2, seed=5)
    made, figures = sample_text(teacher, tmp_path / "whole", **settings)
    assert made.train_tokens + made.heldout_tokens == figures.tokens >= 900 and made.heldout_documents > 0
    said = json.loads((tmp_path / "whole" / "sampled.json").read_text())
    assert said["teacher"] == str(teacher) and len(said["teacher_identity"]) == 64
    assert said["text"] == figures.to_dict() and 0 < said["text"]["cut_share"] <= 1 and said["text"]["given_tokens"] > 0
    shards: list[int] = []

    def stopping(*arguments):
        shards.append(arguments[7][1])
        if len(shards) == 2:
            raise KeyboardInterrupt
        return sample_documents(*arguments)

    monkeypatch.setattr(module, "sample_documents", stopping)
    with pytest.raises(KeyboardInterrupt):
        sample_text(teacher, tmp_path / "stopped", **settings)
    assert not (tmp_path / "stopped").exists()
    with open(tmp_path / ".stopped.parts" / "train.bin", "ab") as file:
        file.write(b"written after the last save")
    sample_text(teacher, tmp_path / "stopped", **settings)
    assert shards[:3] == [0, 1, 1] and shards[3:] == list(range(2, shards[-1] + 1))
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")
    assert not (tmp_path / ".stopped.parts").exists()
    assert DocumentStore(tmp_path / "whole" / "train").read(0, 0, 1)[0] < 300, "an id that the tokenizer has"


def test_a_blend_with_sampled_text_trains(teacher, starts, tmp_path, one_rank, monkeypatch):
    """A run reads it beside other text; a loader that takes .05 s a batch is seen in the share of time waited for input."""

    def slow(*arguments):
        for batch in batches(*arguments):
            time.sleep(0.05)
            yield batch

    monkeypatch.setattr(data_loader, "batches", slow)
    monkeypatch.setattr(data_loader, "ahead", lambda made: made)
    mh.convert(teacher, tmp_path / "model")
    sample_text(tmp_path / "model", tmp_path / "own", tokens=700, length=64, batch_size=4, heldout_fraction=0.2)
    blend = [{"data": str(tmp_path / "own"), "weight": 0.5}, {"data": str(starts), "weight": 0.5}]
    mh.train(
        stage="pretrain", model=str(tmp_path / "model"), data=str(starts), text={"blend": blend}, output=str(tmp_path / "run"),
        sequence_length=32, micro_batch_size=2, global_batch_size=2, train_tokens=1280, eval_windows=2,
        logging={"tensorboard": False},
    )  # fmt: skip
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "own" in log and "input wait" in log and (tmp_path / "run" / "model").is_dir()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, *others = [record for record in records if "input_wait_share" in record]
    assert [record["step"] for record in (first, *others)] == [1, 10, 20]
    for before, record in zip((first, *others), others):
        tokens = record["tokens"] - before["tokens"]
        waited = record["input_wait_share"] * tokens / record["tokens_per_second"]
        assert 0.95 * 0.05 * (record["step"] - before["step"]) < waited and record["input_wait_share"] < 1


def test_text_that_repeats_itself_is_left_out_and_counted(teacher, tmp_path):
    """Greedy text of a random model runs in circles; where that is all, the verb ends with the reason."""
    assert repetition([1, 2, 3] * 100) > 0.9 and repetition(list(range(300))) == 0
    with pytest.raises(ConfigError, match=r"nothing of .* can be used: .* of repetition above 0.01"):
        sample_text(teacher, tmp_path / "out", 500, 90, temperature=0, batch_size=2, max_repetition=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 129}, "past the 128 positions"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"chat_share": 0.7, "starts_share": 0.7}, "at most 1 together"),
        ({"starts_share": 0.5}, "need both starts, .*, got no starts and starts_share 0.5"),
        ({"chat_share": 0.5}, "has no chat template"),
        ({"length": 6, "starts": "starts", "start_tokens": 9}, "leave no room in rows of 6"),
        ({"starts": "starts", "start_tokens": 9000}, "is longer than start_tokens"),
        ({"starts": "other"}, "was made with another tokenizer"),
        ({"output": "starts"}, "already exists"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_sampled(changes, message, teacher, starts, tmp_path, tokenizer):  # noqa: F811
    """Each is a sentence, and leaves nothing behind."""
    if changes.get("starts") == "other":
        vocabulary = tokenizer.get_vocab()
        one, two = sorted(np.load(starts / "used_token_ids.npy").tolist())[5:7]
        names = {number: token for token, number in vocabulary.items()}
        renamed = (starts / "tokenizer" / "tokenizer.json").read_text()
        (tmp_path / "other" / "tokenizer").mkdir(parents=True)
        for file in starts.rglob("*.*"):
            if file.name != "manifest.json" and file.is_file():
                (tmp_path / "other" / file.relative_to(starts)).write_bytes(file.read_bytes())
        spec = json.loads(renamed)
        spec["model"]["vocab"] |= {names[one]: two, names[two]: one}
        (tmp_path / "other" / "tokenizer" / "tokenizer.json").write_text(json.dumps(spec))
    given = {"output": "out", "tokens": 100, "length": 64} | changes
    given |= {name: tmp_path / given[name] for name in ("output", "starts") if name in given}
    with pytest.raises(ConfigError, match=message):
        sample_text(teacher, **given)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*.parts"))
