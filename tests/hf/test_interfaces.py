"""Other ways in and out of the Hugging Face models: embeddings, hidden states, Auto classes, checkpointing, Trainer, PEFT."""

import copy

import peft
import pytest
import torch
import transformers

from megatron_hylo.convert.hf_config import model_config_from_hf
from megatron_hylo.hf import HyloConfig, HyloForCausalLM, HyloModel
from megatron_hylo.hf.layers_hylo import HyloMLP
from tests.conftest import gradients, tiny_hf_model
from tests.hf.conftest import random_model, serve_config


@pytest.fixture
def model() -> HyloForCausalLM:
    """All four mixers, fp32."""
    return random_model(serve_config("G+M*"), torch.float32)


@torch.no_grad()
def test_embeddings_in_place_of_tokens_change_nothing(model, ids):
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(ids).logits)
    settings = dict(max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **settings), model.generate(ids, **settings)[:, 75:])


@torch.no_grad()
def test_hidden_states_match_transformers(ids):
    oracle = tiny_hf_model("llama")
    model = HyloForCausalLM(HyloConfig(hylo=model_config_from_hf(oracle.config.to_dict()).to_dict())).eval()
    model.load_state_dict(oracle.state_dict())
    found, expected = (m(ids, output_hidden_states=True).hidden_states for m in (model, oracle))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert model(ids).hidden_states is None
    model.config.output_hidden_states = True
    assert torch.equal(model(ids).hidden_states[1], found[1])
    steps = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, output_hidden_states=True).hidden_states
    assert [[h.shape[1] for h in step] for step in steps] == [[75] * 4, [1] * 4, [1] * 4]


@torch.no_grad()
def test_attention_probabilities_match_transformers(model, ids):
    oracle = tiny_hf_model("llama")
    oracle.set_attn_implementation("eager")
    dense = HyloForCausalLM(HyloConfig(hylo=model_config_from_hf(oracle.config.to_dict()).to_dict())).eval()
    dense.load_state_dict(oracle.state_dict())
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    found, expected = (m(ids, attention_mask=mask, output_attentions=True) for m in (dense, oracle))
    torch.testing.assert_close(found.logits[mask.bool()], expected.logits[mask.bool()], rtol=0, atol=1e-5)
    for mine, theirs in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(mine[1], theirs[1], rtol=0, atol=5e-6)
        torch.testing.assert_close(mine[0, :, 9:], theirs[0, :, 9:], rtol=0, atol=5e-6)
    hybrid = model(ids, attention_mask=mask, output_attentions=True)  # G+M*: the second and the last layer have some
    assert [tuple(layer.shape) for layer in hybrid.attentions] == [(2, 4, 75, 75)] * 2
    torch.testing.assert_close(
        hybrid.logits[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()], rtol=0, atol=1e-4
    )
    assert model(ids).attentions is None
    with torch.enable_grad():
        outputs = model(ids, output_attentions=True)
        assert all(gradient.any() for gradient in torch.autograd.grad(outputs.logits.square().sum(), outputs.attentions))


@torch.no_grad()
def test_base_model_gives_what_the_head_reads(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(base) is HyloModel
    for found in (base(ids), base(ids, use_cache=False), model.model(ids), model.model(ids, use_cache=False)):
        assert torch.equal(model.lm_head(found.last_hidden_state), model(ids).logits)
    assert base(ids).past_key_values.get_seq_length() == 75 and base(ids, use_cache=False).past_key_values is None
    last, cache = model.model(ids, return_dict=False)
    assert torch.equal(last, base(ids).last_hidden_state) and cache.get_seq_length() == 75


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_gradients_of_the_whole(reentrant, model, ids):
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    calls = []
    for module in model.modules():
        if isinstance(module, HyloMLP):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    model.train()

    def backward():
        calls.clear()
        outputs = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
        outputs.loss.backward()
        return outputs, gradients(model)

    _, expected = backward()
    assert len(calls) == 4
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    outputs, found = backward()
    assert len(calls) == 8 and outputs.past_key_values is None  # every layer twice
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    cache = model.eval()(ids).past_key_values
    with pytest.raises(ValueError, match="cannot continue a cache"):
        model.train()(ids[:, :1], past_key_values=cache)


def accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    """Share of next tokens that are the most likely one."""
    assert prediction.predictions.ndim == 3  # logits alone
    hits = prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]
    return {"accuracy": float(hits.mean())}


def test_trainer_evaluates_with_metrics(model, ids, tmp_path):
    rows = torch.cat([ids, ids.flip(1), ids[:1]])
    labels = rows.clone()
    with torch.no_grad():
        labels[:, 1::2] = model(rows).logits.argmax(-1)[:, :-1:2]  # every second prediction is right
    data = [{"input_ids": row, "labels": row_labels} for row, row_labels in zip(rows, labels)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, per_device_eval_batch_size=2, disable_tqdm=True,
        per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=1, learning_rate=0.0, logging_steps=1,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data, compute_metrics=accuracy)
    model.config.use_cache = True  # which transformers 5 turns off for a Trainer, and 4 does not
    metrics = trainer.evaluate()
    with torch.no_grad():
        outputs = model(rows, labels=labels)
    hits = (outputs.logits.argmax(-1)[:, :-1] == labels[:, 1:]).double().mean().item()
    assert metrics["eval_accuracy"] == pytest.approx(hits, abs=1e-6) and hits >= 0.5
    assert metrics["eval_loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)
    assert trainer.model_accepts_loss_kwargs  # the loss is the mean over all of a step's tokens
    same = transformers.Trainer(model, arguments, train_dataset=[data[0], data[0]])
    same.train()
    with torch.no_grad():
        expected = model(rows[:1], labels=labels[:1]).loss.item()
    assert same.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_peft_adapters_train_save_and_merge(model, ids, tmp_path):
    base = copy.deepcopy(model)
    settings = dict(r=4, task_type="CAUSAL_LM", target_modules="all-linear")
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    assert torch.equal(adapted.eval()(ids).logits, base(ids).logits)  # an adapter begins as nothing
    adapted.train()
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(adapted(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    adapted.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    generation = dict(attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        logits, text = adapted(ids, attention_mask=mask).logits, adapted.generate(input_ids=ids, **generation)
        assert torch.equal(loaded(ids, attention_mask=mask).logits, logits)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(ids, attention_mask=mask).logits, logits, rtol=0, atol=1e-3)
        assert torch.equal(merged.generate(ids, **generation), text)
        assert not torch.equal(base.generate(ids, **generation), text)


def test_an_adapter_that_would_have_no_effect_is_refused(model, ids):
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=36, task_type="CAUSAL_LM", target_modules=["q_proj", "q_conv1d"]))
    with pytest.raises(ValueError, match="leave conv1d out of target_modules"):
        adapted(input_ids=ids)


def test_attention_of_another_library_is_refused(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not support Flash Attention 2"):
        HyloForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    eager = HyloForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    assert torch.equal(eager(ids).logits, model(ids).logits)
