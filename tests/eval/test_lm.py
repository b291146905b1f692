"""The model class of lm-eval against lm-eval's own for Hugging Face models, on the same weights."""

import copy
import random

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from megatron_hylo.config import ConfigError
from megatron_hylo.convert.open_model import cast_weights
from megatron_hylo.eval import lm_decode
from megatron_hylo.eval.lm import HyloLM
from megatron_hylo.eval.lm_batches import BatchRunner, plan_batches
from megatron_hylo.hf.decode_hylo import join_projections
from megatron_hylo.io.progress import no_progress
from tests.conftest import tiny_hf_model
from tests.hf.conftest import random_model, save_tokenizer, serve_config

MODELS = {
    "llama": lambda: tiny_hf_model("llama"),
    "hybrid": lambda: random_model(serve_config("G+M*K"), torch.float32),
    "hybrid, fixed shapes": lambda: with_fixed_shapes(random_model(serve_config("G+M*K"), torch.float32)),
}
WINDOW = 48


def with_fixed_shapes(model):
    """The model, decoding as on a GPU, where such steps are captured."""
    model.decodes_with_fixed_shapes = True
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=MODELS)
def both(request, tokenizer):
    """(lm-eval's class, which reads every request whole and alone; ours over the same model, with settings)."""
    model = MODELS[request.param]()
    theirs = HFLM(model, tokenizer=tokenizer, batch_size=1, max_length=WINDOW)
    return theirs, lambda **settings: HyloLM(model, tokenizer, **({"max_length": WINDOW} | settings))


def text(generator: random.Random, letters: int) -> str:
    """Random letters, one token each, that begin and end with none of the spaces."""
    return "".join(["a", *(generator.choice("abcdefghijkl mn") for _ in range(letters - 2)), "b"])


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=number) for number, given in enumerate(arguments)]


def pairs() -> list[tuple[str, str]]:
    """Prompts with one answer and prompts that several share, of many lengths, three of them longer than the window."""
    generator = random.Random(0)
    prompts = [text(generator, letters) for letters in (3, 9, 9, 21, 35, 44, 70, 71)]
    found = [
        (prompt, f" {text(generator, letters)}") for prompt in prompts for letters in (2, 2, 9)[: 1 + 2 * (len(prompt) % 2)]
    ]
    return [*found, ("", text(generator, 8)), (text(generator, 60), " " + text(generator, 5)), ("ab ", "c")]


@pytest.mark.parametrize("settings", [{}, {"prefill_tokens": 7}, {"batch_size": 2}], ids=["plain", "pieces", "batches of 2"])
def test_log_likelihoods_match_lm_evals_class(both, settings):
    theirs, ours = both
    asked = requests("loglikelihood", pairs())
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    found = ours(**settings).loglikelihood(asked)
    assert [most for _, most in found] == [most for _, most in expected]
    torch.testing.assert_close([value for value, _ in found], [value for value, _ in expected], rtol=0, atol=1e-4)
    assert max(value for value, _ in found) - min(value for value, _ in found) > 1


def test_log_likelihoods_of_whole_texts_match_lm_evals_class(both):
    theirs, ours = both
    generator = random.Random(1)
    asked = requests("loglikelihood_rolling", [(text(generator, letters),) for letters in (130, 12, 48)])
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    torch.testing.assert_close(ours().loglikelihood_rolling(asked), expected, rtol=1e-6, atol=1e-4)
    logits = ours()
    logits.logits_at_once = 3 * 160  # three columns of the vocabulary at a time
    torch.testing.assert_close(logits.loglikelihood_rolling(asked), expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"prefill_tokens": 7}], ids=["plain", "pieces"])
def test_generations_match_lm_evals_class(both, settings):
    theirs, ours = both
    generator = random.Random(2)
    prompts = [text(generator, letters) for letters in (4, 6, 6, 15, 30, 60, 45)]
    for until, most in (([], [12, 3, 12, 1, 7, 12, 2]), (["a", "be"], [12] * 7)):
        asked = requests(
            "generate_until",
            [(prompt, {"until": list(until), "max_gen_toks": tokens}) for prompt, tokens in zip(prompts, most)],
        )
        expected = theirs.generate_until(asked, disable_tqdm=True)
        assert ours(**settings).generate_until(asked) == expected
        assert len(set(expected)) > 1


def test_tasks_that_stop_alike_are_decoded_in_one_batch(both, monkeypatch):
    """Requests for 2 to 12 tokens take 12 steps, not the sum of their tasks' steps."""
    _, ours = both
    lm, steps = ours(), []
    read = lm_decode.read_prompts
    monkeypatch.setattr(lm_decode, "read_prompts", lambda *given: steps.append(len(given[1])) or read(*given))
    asked = requests("generate_until", [("abcdef", {"until": [], "max_gen_toks": most}) for most in (12, 2, 12, 5)])
    found = lm.generate_until(asked)
    assert steps == [4]
    assert found[0] == found[2] and found[0].startswith(found[1]) and found[0].startswith(found[3])
    assert len(found[0]) > len(found[3]) > len(found[1]) > 0


def test_captured_steps_wait_for_the_tokens_every_eighth_time(tokenizer, monkeypatch):
    """One graph a batch, and no pass of a transformers model after the prompts; weights can still be trained afterwards."""
    model = MODELS["hybrid, fixed shapes"]()
    lm = HyloLM(model, tokenizer, max_length=WINDOW)
    made, steps, waited, passes = [], [], [], []
    for owner, name, calls in (
        (lm_decode.DecodeGraph, "__init__", made),
        (lm_decode.DecodeGraph, "_run", steps),
        (type(model), "forward", passes),
    ):
        old = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, old=old, calls=calls, **more: calls.append(1) or old(*given, **more))
    monkeypatch.setattr(lm_decode.Stopper, "end_of", lambda *given: waited.append(1))  # nothing ends early
    prompts = [tokenizer(prompt).input_ids for prompt in ("abcdef", "bc", "defghijkl")]
    lm.continuations(prompts, [20, 20, 5], [])
    # after the eighth token, the sixteenth and the last; the third prompt has ended at the first look
    assert (len(made), len(steps), len(waited), len(passes)) == (1, 19, 3 + 2 + 2, 2)
    with torch.inference_mode():
        join_projections(model)  # as on a GPU
    model(torch.tensor([prompts[0]]), labels=torch.tensor([prompts[0]])).loss.backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_generations_by_a_captured_graph_match_lm_evals_class(tokenizer, monkeypatch):
    model = MODELS["hybrid"]().cuda()
    generator, captured = random.Random(5), []
    capture = lm_decode.DecodeGraph._capture
    monkeypatch.setattr(lm_decode.DecodeGraph, "_capture", lambda graph: capture(graph) or captured.append(graph.graph))
    asked = requests(
        "generate_until",
        [(text(generator, letters), {"until": [], "max_gen_toks": 20}) for letters in (4, 6, 6, 15, 28, 28)],
    )
    expected = HFLM(model, tokenizer=tokenizer, batch_size=1, max_length=WINDOW).generate_until(asked, disable_tqdm=True)
    assert HyloLM(model, tokenizer, max_length=WINDOW).generate_until(asked) == expected
    assert captured and all(graph is not None for graph in captured)


def test_tokens_after_an_end_are_dropped(tokenizer):
    stopper = lm_decode.Stopper(tokenizer, 7, ["de", "ab c"])
    ids = tokenizer("xxab cabde").input_ids
    assert stopper.end_of(ids[:5], 5) is None
    assert [stopper.end_of(ids, new) for new in (len(ids), 5)] == [6, 6]
    assert stopper.end_of(ids[5:], 5) == 5 and stopper.end_of(ids[5:], 1) == 5
    assert stopper.end_of([20, 7, 21, tokenizer.eos_token_id], 4) == 2 and stopper.end_of([7, 20, 21], 2) is None


def test_looking_at_eight_tokens_finds_the_end_that_looking_at_each_finds(tokenizer):
    """The oracle decodes the whole text after every token; stops reach over two looks, and some texts end by a token."""
    generator, ends = random.Random(3), []
    stops = ["ab", "c\n", "bcade"]
    letters = tokenizer("abcde\n").input_ids
    for trial in range(200):
        stopper = lm_decode.Stopper(tokenizer, 7, stops[trial % 3 :])
        tokens = [generator.choice([*letters, *letters, 7]) if trial % 2 else generator.choice(letters) for _ in range(40)]
        texts = {count: tokenizer.decode(tokens[:count], skip_special_tokens=True) for count in range(1, 41)}
        plain = (n for n, text in texts.items() if tokens[n - 1] in stopper.end or any(stop in text for stop in stopper.stop))
        looks = (stopper.end_of(tokens[:count], 8) for count in range(8, 41, 8))
        ends.append(next(plain, None))
        assert next((end for end in looks if end is not None), None) == ends[-1]
    assert None in ends and len(set(ends)) > 20


def test_prompts_are_tokenised_together_as_one_by_one(tokenizer):
    lm = HyloLM(MODELS["llama"](), tokenizer, max_length=WINDOW)
    texts = ["abc", f"{tokenizer.decode(lm.prefix_token_id)}abc", "", "de f"]
    assert lm._tok_encode_all(texts) == [lm.tok_encode(text) for text in texts]


def test_a_template_without_a_system_turn_gets_the_other_turns(tokenizer):
    """Wherever the system's turn is; templates of Gemma and Mistral refuse it."""
    lm = HyloLM(MODELS["llama"](), copy.deepcopy(tokenizer), max_length=WINDOW)
    lm.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }};"
        "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("system", "b"), ("user", "c"))]
    assert lm.apply_chat_template(turns) == lm.apply_chat_template([turns[1], turns[0], turns[2]]) == "a;c;>"


def test_a_stop_string_ends_a_sequence_and_its_text(both, tokenizer):
    _, ours = both
    lm = ours()
    prompts = [tokenizer("abc").input_ids, tokenizer("abcdefg").input_ids]
    whole = lm.continuations(prompts, 12, [])
    assert all(len(one) > 3 for one in whole)
    stop = whole[0][2:4]  # two letters that the first continuation is known to hold
    assert lm.continuations(prompts, 12, [stop]) == [one.split(stop)[0] for one in whole]


def test_answers_are_right_where_the_model_would_write_them(both, tokenizer):
    theirs, ours = both
    lm = ours()
    prompt = tokenizer("abcdefgh").input_ids
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(4):
            ids = torch.cat([ids, theirs.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    right = ids[0].tolist()
    wrong = [*right[:-1], (right[-1] + 1) % 160]
    first, second = lm.answers_correct([right, wrong], [4, 4])
    assert first.exact and first.correct == (True,) * 4
    assert not second.exact and second.correct == (True, True, True, False)
    assert second.log_probs[:3] == pytest.approx(first.log_probs[:3], abs=1e-5) and second.log_prob < first.log_prob
    (all_of_it,) = lm.token_log_probs([right])
    assert len(all_of_it) == len(right) - 1 and all_of_it[-4:].tolist() == pytest.approx(first.log_probs, abs=1e-5)


def test_what_cannot_work_is_refused(both):
    _, ours = both
    with pytest.raises(ConfigError, match="16 new tokens leave no room for a prompt in 16"):
        ours(max_length=16).continuations([[1]], 16, [])
    with pytest.raises(ConfigError, match="asks for sampling"):
        ours().generate_until(requests("generate_until", [("ab", {"do_sample": True, "temperature": 1.0})]))
    with pytest.raises(ConfigError, match="batch_size must be a number of at least 1 or auto, got 'many'"):
        ours(batch_size="many")


def test_weights_are_cast_but_the_decays():
    model = random_model(serve_config("G+M*K"), torch.float32)
    cast_weights(model, torch.bfloat16)
    kinds = {name.rsplit(".", 1)[-1]: parameter.dtype for name, parameter in model.named_parameters()}
    kept = {"A_log", "dt_bias", "D"}
    assert kept < set(kinds) and all((kind == torch.float32) == (name in kept) for name, kind in kinds.items())


def test_batches_hold_all_sequences_within_their_limits():
    generator = random.Random(3)
    lengths = [generator.randint(1, 3000) for _ in range(300)]
    batches = plan_batches(lengths, tokens=8000, rows=16)
    assert sorted(index for batch in batches for index in batch) == list(range(300))
    for batch in batches:
        longest, shortest = (pick(lengths[index] for index in batch) for pick in (max, min))
        assert len(batch) <= 16 and len(batch) * longest <= 8000 and longest - shortest <= max(32, longest // 4)
    assert len(batches) < 100


def test_tokens_that_are_written_take_memory_and_no_part_in_the_lengths():
    """Prompts of a batch are nearly of one length, whatever is written after them."""
    lengths, new = [1000, 1000, 20, 20], [10, 1000, 1000, 10]
    assert plan_batches(lengths, tokens=4000, rows=16, new=new) == [[0, 1], [2, 3]]
    assert plan_batches(lengths, tokens=3999, rows=16, new=new) == [[0], [1], [2, 3]]


def test_batches_that_do_not_fit_are_halved_and_later_ones_cut():
    tried, done = [], []

    def work(batch: list[int]) -> None:
        tried.append(len(batch))
        if len(batch) > 5:
            raise torch.OutOfMemoryError
        done.extend(batch)

    runner = BatchRunner(tokens=800, rows=16)
    runner.run([50] * 40, work, no_progress, "")
    assert sorted(done) == list(range(40)) and tried[:3] == [16, 8, 4] and tried.count(16) == 1 and tried.count(8) == 1
    with pytest.raises(torch.OutOfMemoryError):
        runner.run([50], lambda batch: work([0] * 6), no_progress, "")
