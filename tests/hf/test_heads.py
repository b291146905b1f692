"""Heads for sequences, tokens and answers: against Llama's, against their formula, by Trainer, saved and loaded."""

import copy

import peft
import pytest
import torch
import transformers
from transformers.modeling_outputs import ModelOutput

from megatron_hylo.convert.hf_config import model_config_from_hf
from megatron_hylo.hf import HyloConfig, HyloForQuestionAnswering, HyloForSequenceClassification, HyloForTokenClassification
from tests.conftest import gradients, tiny_hf_model
from tests.hf.conftest import random_model, serve_config

# kind -> Auto class, Llama's class, ours
HEADS = {
    "sequence": (
        transformers.AutoModelForSequenceClassification,
        transformers.LlamaForSequenceClassification,
        HyloForSequenceClassification,
    ),
    "token": (
        transformers.AutoModelForTokenClassification,
        transformers.LlamaForTokenClassification,
        HyloForTokenClassification,
    ),
    "answer": (
        transformers.AutoModelForQuestionAnswering,
        transformers.LlamaForQuestionAnswering,
        HyloForQuestionAnswering,
    ),
}
heads = pytest.mark.parametrize("head", HEADS)
sides = pytest.mark.parametrize("side", ["left", "right"])


def padded(ids, side):
    """(ids, attention_mask) [2, 75]: the second sequence has 60 tokens, token 0 is its padding."""
    ids, mask = ids.clamp(min=1), torch.ones_like(ids)
    place = slice(0, 15) if side == "left" else slice(60, 75)
    ids[1, place], mask[1, place] = 0, 0
    return ids, mask


def labels(head):
    """Labels for two sequences of 75 tokens."""
    if head == "answer":
        return {"start_positions": torch.tensor([3, 20]), "end_positions": torch.tensor([4, 40])}
    of_tokens = torch.randint(3, (2, 75))
    of_tokens[1, 50:] = -100
    return {"labels": of_tokens if head == "token" else torch.tensor([0, 2])}


def scores(outputs: ModelOutput) -> torch.Tensor:
    """Scores [batch, labels] or [batch, tokens, labels]; of answers the two of a first and of a last token."""
    return outputs.logits if "logits" in outputs else torch.stack([outputs.start_logits, outputs.end_logits], -1)


def beside_llama(head):
    """(ours, Llama's) with the same weights, without dropout."""
    settings = dict(pad_token_id=0, num_labels=3, classifier_dropout=0.0)
    config = tiny_hf_model("llama").config
    for name, value in settings.items():
        setattr(config, name, value)
    _, llama, own = HEADS[head]
    oracle = llama(config).train()
    model = own(HyloConfig(hylo=model_config_from_hf(config.to_dict()).to_dict(), **settings)).train()
    model.load_state_dict({ours(name): weight for name, weight in oracle.state_dict().items()})
    return model, oracle


def ours(name: str) -> str:
    """The name here of a parameter of Llama's, whose backbone has an old name where it answers questions."""
    return name.replace("transformer.", "model.", 1)


@pytest.fixture
def hybrid(tmp_path):
    """open(head): a hybrid by its Auto class from a saved model without a head, whose new head is random."""

    def open_(head):
        base = random_model(serve_config("G+M*"), torch.float32)
        base.config.pad_token_id = 0
        base.save_pretrained(tmp_path / "base")
        auto, _, own = HEADS[head]
        model = auto.from_pretrained(tmp_path / "base", num_labels=3, dtype=torch.float32).eval()
        assert type(model) is own and torch.equal(model.model.norm.weight, base.model.norm.weight)
        for parameter in (model.qa_outputs if head == "answer" else model.score).parameters():
            torch.nn.init.normal_(parameter)
        return model

    return open_


@torch.no_grad()
@sides
@heads
def test_scores_of_padded_sequences_match_llama(head, side, ids):
    model, oracle = beside_llama(head)
    ids, mask = padded(ids, side)
    found, expected = (scores(m(ids, attention_mask=mask)) for m in (model, oracle))
    real = slice(None) if head == "sequence" else mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=3e-5)


@heads
def test_the_loss_and_its_gradients_match_llama(head, ids):
    given = dict(input_ids=ids.clamp(min=1), **labels(head))
    model, oracle = beside_llama(head)
    losses = [m(**given).loss for m in (model, oracle)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    found, expected = gradients(model), {ours(name): gradient for name, gradient in gradients(oracle).items()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@torch.no_grad()
@sides
@heads
def test_scores_are_the_heads_of_each_sequences_own_hidden_states(head, side, hybrid, tmp_path, ids):
    model, (ids, mask) = hybrid(head), padded(ids, side)
    model.save_pretrained(tmp_path / "saved")
    again = HEADS[head][0].from_pretrained(tmp_path / "saved", dtype=torch.float32)
    found = scores(again(ids, attention_mask=mask))
    score = model.qa_outputs if head == "answer" else model.score
    for row in range(2):
        real = mask[row].bool()
        expected = score(model.model(ids[row : row + 1, real]).last_hidden_state[0])
        mine, expected = (found[row], expected[-1]) if head == "sequence" else (found[row, real], expected)
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-4)


@heads
def test_trainer_takes_the_mean_loss_of_accumulated_batches_and_lowers_it(head, hybrid, tmp_path, ids):
    model, given = hybrid(head), labels(head)
    data = [{"input_ids": ids[row].clamp(min=1), **{name: value[row] for name, value in given.items()}} for row in range(2)]
    if head == "token":
        model.dropout.p = 0.0
    arguments = transformers.TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, per_device_train_batch_size=1, max_steps=6,
        gradient_accumulation_steps=2, learning_rate=3e-3, logging_steps=1, per_device_eval_batch_size=1, save_strategy="no",
    )  # fmt: skip
    with torch.no_grad():
        expected = sum(model(**{name: value[None] for name, value in row.items()}).loss for row in data) / 2
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert history[0] == pytest.approx(expected.item(), rel=1e-4) and history[-1] < 0.8 * history[0]
    assert trainer.evaluate()["eval_loss"] < 0.8 * history[0]


@heads
def test_peft_trains_a_head_with_its_adapters_and_loads_both(head, hybrid, tmp_path, ids):
    kind = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "answer": "QUESTION_ANS"}[head]
    base, given = hybrid(head), labels(head)
    settings = dict(r=4, target_modules="all-linear", exclude_modules=["score", "qa_outputs"])  # which are trained as a whole
    adapted = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type=kind, **settings)).eval()
    mask, optimizer = torch.ones_like(ids), torch.optim.Adam(adapted.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        losses.append(adapted(input_ids=ids.clamp(min=1), attention_mask=mask, **given).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(scores(loaded(ids.clamp(min=1))), scores(adapted(ids.clamp(min=1))))
