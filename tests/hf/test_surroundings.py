"""Models in other parts of transformers and in other libraries: offloading, classifiers, prompts that are learnt, programs."""

import copy
import types
from pathlib import Path

import peft
import pytest
import torch
import transformers

from megatron_hylo.hf import HyloForCausalLM
from megatron_hylo.hf.code_files import copy_modelling_code
from tests.hf.conftest import ALIGNED, random_model, save_tokenizer, serve_config

GREEDY = dict(max_new_tokens=3, do_sample=False, pad_token_id=0)


@torch.no_grad()
def test_weights_offloaded_to_disk_give_the_same_text(tmp_path, ids):
    model = random_model(serve_config("GMK+*+", **(ALIGNED["G+*+ pairs, bias"] | {"mla_rotary_pairs": ()})), torch.float32)
    model.save_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.layers.5": "cpu"}
    places |= {f"model.layers.{layer}": "disk" for layer in range(5)}
    offloaded = HyloForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, device_map=places, offload_folder=tmp_path / "o")
    assert offloaded.model.layers[0].mlp.up_proj.weight.is_meta
    torch.testing.assert_close(offloaded(ids).logits, model(ids).logits, rtol=0, atol=1e-4)
    assert torch.equal(offloaded.generate(ids[:, :20], **GREEDY), model.generate(ids[:, :20], **GREEDY))


@torch.no_grad()
def test_a_cache_of_one_prompt_is_continued_by_several(ids):
    model = random_model(serve_config("G+M*"))
    cache = model(ids[:, :70]).past_key_values
    cache.batch_repeat_interleave(2)
    ends = torch.randint(160, (4, 5))
    found = model(ends, past_key_values=cache).logits
    whole = model(torch.cat([ids[:, :70].repeat_interleave(2, 0), ends], 1)).logits[:, 70:]
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-10)
    cache.batch_select_indices(torch.tensor([3, 1]))
    more = model(ends[[3, 1]], past_key_values=cache).logits
    again = model(torch.cat([ids[[1, 0], :70], ends[[3, 1]], ends[[3, 1]]], 1)).logits[:, 75:]
    torch.testing.assert_close(more, again, rtol=0, atol=1e-10)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_longer_vocabulary_is_saved_and_described(tied, tmp_path, ids):
    model = random_model(serve_config("G+", untie_embeddings_and_output_weights=not tied), torch.float32)
    before = model(ids).logits
    model.resize_token_embeddings(170)
    model.save_pretrained(tmp_path)
    again = HyloForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.config.vocab_size == again.config.hylo["vocab_size"] == 170
    torch.testing.assert_close(again(ids).logits[..., :160], before, rtol=0, atol=1e-5)


def test_prompt_tuning_trains_and_generates(ids):
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(random_model(serve_config("G+"), torch.float32), settings)
    mask = torch.ones_like(ids)
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    assert model.prompt_encoder["default"].embedding.weight.grad.abs().sum() > 0
    assert model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **GREEDY).shape == (2, 78)


def test_a_saved_model_has_its_code_beside_it(tmp_path):
    random_model(serve_config("G+"), torch.float32).save_pretrained(tmp_path / "saved")
    (tmp_path / "code").mkdir()
    for file in copy_modelling_code(tmp_path / "code"):
        assert (tmp_path / "saved" / file.name).read_text() == file.read_text()
    config = transformers.PreTrainedConfig.get_config_dict(tmp_path / "saved")[0]
    for place in config["auto_map"].values():
        module, name = place.split(".")
        assert f"class {name}(" in (tmp_path / "saved" / f"{module}.py").read_text()


@pytest.mark.parametrize("how", ["save_pretrained", "push_to_hub"])
def test_an_upload_has_the_code_beside_the_weights(how, tmp_path, monkeypatch):
    sent = []
    hub = types.SimpleNamespace(
        create_repo=lambda name, **_: types.SimpleNamespace(repo_id=name),
        create_commit=lambda operations, **_: sent.extend(operation.path_in_repo for operation in operations),
    )
    card = types.SimpleNamespace(save=lambda file: Path(file).write_text("a card"))
    for module in (transformers.modeling_utils, transformers.utils.hub):
        monkeypatch.setattr(module, "hf_api", lambda: hub)
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *_, **__: card)
    model = random_model(serve_config("G+"), torch.float32)
    model.save_pretrained(tmp_path / "saved")  # once more: what is there already is only sent if it is written again
    if how == "push_to_hub":
        model.push_to_hub("someone/model")
    else:
        model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="someone/model")
    code = {file.name for file in copy_modelling_code(tmp_path)}
    assert set(sent) == code | {"config.json", "generation_config.json", "model.safetensors", "README.md"}


def test_a_cache_of_inference_mode_is_continued_with_gradients(ids):
    model = random_model(serve_config("GK+M*W"))
    with torch.inference_mode():
        cache = model(ids[:, :70]).past_key_values
    found = model(ids[:, 70:], past_key_values=cache).logits
    with torch.no_grad():
        cache = model(ids[:, :70]).past_key_values
    expected = model(ids[:, 70:], past_key_values=cache).logits
    weight = model.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(*(torch.autograd.grad(logits.square().sum(), weight)[0] for logits in (found, expected)))


def test_a_stop_string_ends_the_text(tmp_path, ids):
    save_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    model, settings = random_model(serve_config("G+"), torch.float32), dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    model.lm_head.weight.data[:2] = model.lm_head.weight.data[28:] = 0  # letters alone
    whole = model.generate(ids[:1], **settings)[0, 75:].tolist()
    stop = tokenizer.decode(whole[3])
    found = model.generate(ids[:1], **settings, stop_strings=[stop], tokenizer=tokenizer)[0, 75:].tolist()
    assert found == whole[: whole.index(whole[3]) + 1]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "config", [serve_config("GK+M*W"), serve_config("G+*+", **ALIGNED["G+*+ pairs, bias, aligned q/k-norm"])]
)
@torch.no_grad()
def test_an_exported_program_gives_the_models_logits(config, padded, ids):
    model, mask = random_model(config, torch.float32), torch.ones_like(ids)
    mask[0, :9] = 0
    settings = dict(use_cache=False) | (dict(attention_mask=mask) if padded else {})
    program = torch.export.export(model, (ids,), settings, strict=False)
    found, expected = program.module()(ids, **settings).logits, model(ids, **settings).logits  # eager after the export
    torch.testing.assert_close(found[:, 9:], expected[:, 9:], rtol=0, atol=1e-4)


@torch.no_grad()
def test_exported_programs_read_a_prompt_and_decode_with_the_models_logits(ids):
    """A cache leaves the program of the prompt and enters and leaves that of one token, for any number of sequences."""
    model = random_model(serve_config("GK+M*W"), torch.float32)
    prompt, token, sequences = ids[:, :40].clone(), ids[:, 40:41], {0: torch.export.Dim.DYNAMIC}
    read = torch.export.export(model, (), {"input_ids": prompt}, dynamic_shapes={"input_ids": sequences}, strict=False).module()
    decode = torch.export.export(
        model, (), {"input_ids": token, "past_key_values": read(input_ids=prompt).past_key_values}
    ).module()
    for rows in ([0, 1], [1]):
        found = read(input_ids=prompt[rows])
        torch.testing.assert_close(found.logits, model(prompt[rows]).logits, rtol=0, atol=1e-4)
    expected, held = model(prompt).past_key_values, read(input_ids=prompt).past_key_values
    found, outputs = decode(input_ids=token, past_key_values=held), model(token, past_key_values=expected)
    torch.testing.assert_close(found.logits, outputs.logits, rtol=0, atol=1e-4)
    assert held.length == 40, "a program changes no input"
    token = ids[:, 50:51]  # the model goes on with a cache that a program returned
    found, outputs = model(token, past_key_values=found.past_key_values), model(token, past_key_values=expected)
    torch.testing.assert_close(found.logits, outputs.logits, rtol=0, atol=1e-4)
    assert found.past_key_values.length == expected.length == 42


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mixers", ["*", "+", "M", "G", "K", "W"])
@torch.no_grad()
def test_all_ways_to_read_a_sequence_give_the_full_forwards_logits(mixers, dtype, bound, ids):
    """Whole = in pieces = token by token = in a padded batch, each within the dtype's rounding of the fp64 model."""
    model = random_model(serve_config(mixers), torch.float32)
    for name, parameter in model.named_parameters():
        if name.rsplit(".")[-1] not in model._keep_in_fp32_modules_strict:
            parameter.data = parameter.data.to(dtype)
    ids = ids[:, :40]
    expected = copy.deepcopy(model).double()(ids, use_cache=False).logits
    mask = torch.ones(2, 47, dtype=torch.long)
    mask[:, :7] = 0
    padded = torch.cat([torch.full((2, 7), 5), ids], 1)
    ways = {"whole": model(ids).logits, "padded": model(padded, attention_mask=mask).logits[:, 7:]}
    for name, pieces in {"pieces": [13, 1, 26], "tokens": [1] * 40}.items():
        cache, logits = None, []
        for piece in ids.split(pieces, dim=1):
            outputs = model(piece, past_key_values=cache)
            cache = outputs.past_key_values
            logits.append(outputs.logits)
        ways[name] = torch.cat(logits, 1)
    errors = {name: float((logits - expected).norm() / expected.norm()) for name, logits in ways.items()}
    assert max(errors.values()) < bound, errors
