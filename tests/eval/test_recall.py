"""The recall suite. Oracle: a model that copies what followed the longest match of its last tokens, from a known memory."""

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from megatron_hylo.config import ConfigError
from megatron_hylo.data import recall_wording as training
from megatron_hylo.data.preprocess import preprocess
from megatron_hylo.data.recall_text import led_in
from megatron_hylo.eval import recall_text
from megatron_hylo.eval.lm import HyloLM
from megatron_hylo.eval.perplexity_positions import run_by_position
from megatron_hylo.eval.recall import DEPTHS, _edge, make_text, run_recall
from megatron_hylo.eval.recall_haystack import TextEncoder, load_haystack
from megatron_hylo.eval.recall_text import FACTS, RECALL_EVAL_TASKS
from megatron_hylo.eval.results import mean_by_group
from megatron_hylo.eval.ruler.sources import generators
from tests.conftest import tiny_hf_model
from tests.data.conftest import WORDS, tokenizer  # noqa: F401  the fixture

LENGTH = 2400  # the tiny tokenizer has little more than bytes


class Rows:
    """Cache of the oracle: the tokens that each sequence has read."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def reorder_cache(self, rows: torch.Tensor) -> None:
        self.rows = [list(self.rows[i]) for i in rows.tolist()]


class Copier(torch.nn.Module):
    """Predicts what followed the longest earlier match of the last tokens, among the last `memory` tokens."""

    def __init__(self, vocabulary: int, memory: int = 10**9) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(vocab_size=vocabulary, max_position_embeddings=65536)
        self.generation_config = SimpleNamespace(eos_token_id=[])
        self.memory = memory

    def forward(self, input_ids, past_key_values=None, logits_to_keep=None, attention_mask=None, use_cache=True, **_):
        rows = [list(row) for row in past_key_values.rows] if past_key_values else [[] for _ in input_ids]
        last = isinstance(logits_to_keep, int)  # so many of the last ones, as in transformers
        wanted = set(range(input_ids.shape[1])[-logits_to_keep:] if last else logits_to_keep.tolist())
        predicted = []
        for number, new in enumerate(input_ids.tolist()):
            real = attention_mask[number, -len(new) :].tolist() if attention_mask is not None else [1] * len(new)
            for place, (token, counts) in enumerate(zip(new, real)):
                rows[number] += [token] * counts
                if place in wanted:
                    predicted.append(self.copy(np.array(rows[number][-self.memory :])))
        logits = one_hot(torch.tensor(predicted, dtype=torch.long), self.config.vocab_size).float()
        return SimpleNamespace(
            logits=logits.view(len(input_ids), -1, self.config.vocab_size), past_key_values=Rows(rows) if use_cache else None
        )

    @staticmethod
    def copy(row: np.ndarray) -> int:
        candidates = np.flatnonzero(row[:-1] == row[-1])
        depth = 1
        while len(candidates) > 1:
            longer = candidates[(candidates >= depth) & (row[np.maximum(candidates - depth, 0)] == row[-1 - depth])]
            if not len(longer):
                break
            candidates, depth = longer, depth + 1
        return int(row[candidates[0] + 1]) if len(candidates) else 0


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A folder of text with sentences and paragraphs."""
    folder = tmp_path_factory.mktemp("text")
    generator = np.random.default_rng(0)
    for number in range(12):
        sentences = [" ".join(generator.choice(WORDS, 9)).capitalize() + "." for _ in range(40)]
        paragraphs = [" ".join(sentences[i : i + 4]) for i in range(0, 40, 4)]
        (folder / f"{number}.txt").write_text("\n\n".join(paragraphs))
    return folder


@pytest.fixture(scope="module")
def data(text, tokenizer, tmp_path_factory) -> Path:  # noqa: F811
    """A dataset folder of the same text, half of it held out."""
    folder = tmp_path_factory.mktemp("data")
    lines = [{"source": "made", "name": file.name, "text": file.read_text()} for file in sorted(text.iterdir())]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokenizer.save_pretrained(folder / "tokenizer")
    preprocess(str(folder / "text.jsonl"), str(folder / "data"), str(folder / "tokenizer"), heldout_fraction=0.5)
    return folder / "data"


@pytest.fixture
def copier(tokenizer):  # noqa: F811
    """(memory) -> the oracle as a `HyloLM`."""
    return lambda memory=10**9: HyloLM(Copier(len(tokenizer), memory), tokenizer, dtype="fp32")


def value(scores, task, metric="exact", depth=None) -> float:
    """The one score of a task, metric and depth."""
    (found,) = [s for s in scores if (s.task, s.metric, s.depth) == (task, metric, depth)]
    return found.value


def ruler_templates() -> dict[str, str]:
    """RULER's sentences as lm-eval has them, {key} and {value} where they stand, without the context."""
    modules = generators()
    example, _, _ = modules.prepare_niah.generate_input_output(
        5, modules.prepare_niah.get_haystack("needle"), type_haystack="needle", num_needle_k=1, type_needle_k="words",
        num_needle_v=1, type_needle_v="numbers", template=modules.niah_utils.TEMPLATE,
    )  # fmt: skip
    assert re.search(r"One of the special magic numbers for \S+ is: [0-9]+\.", example)
    source = Path(modules.prepare_niah.__file__).read_text()
    prefixes = re.findall(r'f"(The special magic .*)"', source)
    assert len(prefixes) == 2
    found = {"needle": modules.prepare_niah.NEEDLE, **{f"prefix {i}": text + " {value}" for i, text in enumerate(prefixes)}}
    found |= {f"niah {i}": text for i, text in enumerate(modules.niah_utils.TEMPLATE.split("{context}"))}
    vt, cwe, fwe = modules.vt_utils.CONFIG["variable_tracking"], modules.cwe_utils.CONFIG, modules.fwe_utils.CONFIG
    for name, config in {"vt": vt, "cwe": cwe, "fwe": fwe, "qa": modules.qa_utils.CONFIG}.items():
        parts = [part for text in (config["template"], config["answer_prefix"]) for part in text.split("{context}")]
        found |= {f"{name} {i}": text for i, text in enumerate(parts) if re.search(r"\w \w", text)}  # not "Answer:" alone
    found |= {"vt first": "VAR {key} = {value}", "vt next": "VAR {key} = VAR {value}"}
    found = {name: re.sub(r"\{type_needle_v\}", "numbers", text) for name, text in found.items()}
    found = {name: re.sub(r"\{type_needle_v\[:-1\]\}", "number", text) for name, text in found.items()}
    return {name: re.sub(r"\{query\}", "{key}", text) for name, text in found.items()}


def training_texts() -> list[str]:
    """All templates of the exercises, each with every noun and secret."""
    nouns, secrets = [("{noun}", noun) for noun in training.NOUNS], [("{secret}", secret) for secret in training.SECRETS]
    nouns += [(mark, word(noun)) for noun in training.NOUNS
              for mark, word in (("{a}", training.with_article), ("{nouns}", training.plural))]  # fmt: skip
    secrets += [("{Secret}", secret) for secret in training.SECRETS]
    found = []
    for text in training.TEMPLATES:
        names = [(mark, word) for mark, word in nouns + secrets if mark in text]
        found += [text.replace(mark, word) for mark, word in names] or [text]
    return found


def with_lead_ins(template: str) -> list[str]:
    """A template, and as it is with each lead-in that its answer may have."""
    before, mark, after = template.partition("{answer}")
    lead_ins = training.LEAD_INS if mark and before.endswith(training.ENDS) else ()
    return [template, *(f"{led_in(before, lead_in)}{mark}{after}" for lead_in in lead_ins)]


def test_templates_and_keys_are_none_of_the_training_exercises():
    """No template is shared, whatever stands for its values, nouns and secrets, and no word of a key."""
    assert not recall_text.KEY_WORDS & {word.lower() for word in training.KEY_WORDS}

    def plain(templates) -> set[str]:
        return {re.sub(r"\W+", " ", re.sub(r"\{\w+\}", "", text)).strip().lower() for text in templates} - {""}

    ours, theirs = plain(text for pair in recall_text.TEMPLATES for text in pair), plain(training_texts())
    assert len(ours) > 15 and len(theirs) > 2000
    assert not [(a, b) for a in ours for b in theirs if a in b or b in a]
    ruler = plain(ruler_templates().values())
    assert not [
        (a, b) for a in ruler for b in theirs if a in b and len(a.split()) > 1 or b in a and len(b.split()) > 2 or a == b
    ]


def test_no_frame_of_training_makes_an_evaluations_sentence():
    """Whatever noun, secret or key is put into a frame, the sentence is none of our evaluation's and none of RULER's."""
    held_out = [text for fact, question in recall_text.TEMPLATES for text in (fact, question + " {value}")]
    held_out += list(ruler_templates().values())
    plain = [re.sub("[ \n]+", " ", re.sub(r"\{(key|value)\}", r"\1\1\1", text).lower()) for text in held_out]
    assert "the special magic number for keykeykey mentioned in the provided text is valuevaluevalue" in plain
    kinds = {"key": "(the )?keykeykey", "value": "valuevaluevalue", "words": "[^.?!:=]+"}
    kind_of = dict.fromkeys(("key", "the", "The", "name", "source", "all"), "key") | dict.fromkeys(("value", "answer"), "value")
    templates = [text for template in training.TEMPLATES for text in with_lead_ins(template)]
    assert any("is: {answer}" in text for text in templates)  # as RULER's needles have it
    for template in templates:
        text = template.replace("{{", "{").replace("}}", "}").strip().strip(".")
        if not re.search(r"\{(value|answer)\}", text):
            continue  # a fact that gives no value: a later one of a chain, one that is counted
        parts = re.split(r"\{(\w+)\}", re.sub("[ \n]+", " ", text))
        pattern = "".join(
            kinds[kind_of.get(part, "words")] if number % 2 else re.escape(part.lower()) for number, part in enumerate(parts)
        )
        assert not [sentence for sentence in plain if re.search(pattern, sentence)], template
    assert not [text for text in training_texts() if "special magic" in text.lower() or "provided text" in text.lower()]


def test_hyphenated_names_are_none_of_rulers_keys():
    """RULER's keys are an adjective and a noun with a hyphen, as some names of the exercises are."""
    theirs = set(generators().prepare_niah.WORDS)
    assert len(theirs) > 10**6
    assert not [name for q in training.QUALITIES for t in training.THINGS if (name := f"{q}-{t}") in theirs]


@pytest.mark.parametrize("task", RECALL_EVAL_TASKS)
def test_facts_are_where_the_names_say_and_the_rest_is_the_text(text, tokenizer, task):  # noqa: F811
    """Length, depth, fact, question and answer of examples, by decoding them; the text is a stretch between sentence ends."""
    encoder = TextEncoder(tokenizer)
    haystack = load_haystack(text, encoder, tokenizer, LENGTH, 3)
    whole = tokenizer.decode(haystack.ids)
    seen: Counter[float] = Counter()
    for number in range(10):
        made = make_text(task, LENGTH, number, DEPTHS, 1000, haystack, encoder, 3)
        assert max(len(made.ids) + len(q.ids) for q in made.questions) == LENGTH
        spans = []
        for question, place in zip(made.questions, made.places, strict=True):
            stop = next(
                stop for stop in range(place.token + 5, len(made.ids) + 1)
                if re.fullmatch(r"\n\n.+\n\n", tokenizer.decode(made.ids[place.token : stop]))
            )  # fmt: skip
            fact, answer = (
                tokenizer.decode(made.ids[place.token : stop]),
                tokenizer.decode(question.ids[-question.answer_length :]),
            )
            assert answer == f" {question.answer}" and re.fullmatch("[1-9][0-9]{4}", question.answer)
            asked = tokenizer.decode(question.ids[: -question.answer_length])
            assert re.split(r"[?.] ", asked)[-1] + answer in fact  # it ends in the words before the value
            spans.append((place.token, stop, place.depth))
            seen[place.depth] += 1
        assert len({q.answer for q in made.questions}) == len(made.questions) == FACTS[task]
        room = len(made.ids) - sum(stop - start for start, stop, _ in spans)
        rest, inserted = [], 0
        for start, stop, depth in sorted(spans):
            rest += made.ids[len(rest) + inserted : start]
            assert abs(len(rest) - depth * room) <= room // 32 + 1, depth
            inserted += stop - start
        body = tokenizer.decode(rest + made.ids[len(rest) + inserted :])
        assert body in whole and body.rstrip().endswith(".")
        assert whole.startswith(body) or re.search(r"[.\n]$", whole[: whole.index(body)])
    assert set(seen) == set(DEPTHS) and max(seen.values()) == min(seen.values())


def test_examples_are_the_same_whatever_else_is_asked_for(text, tokenizer):  # noqa: F811
    """A text depends on seed, task, length and number; fewer trials ask fewer questions about it."""
    encoder = TextEncoder(tokenizer)
    haystack = load_haystack(text, encoder, tokenizer, LENGTH, 3)
    one, again, few, other = (
        make_text("key_value", LENGTH, number, DEPTHS, trials, haystack, encoder, seed)
        for number, trials, seed in ((1, 100, 3), (1, 100, 3), (1, 13, 3), (1, 100, 4))
    )
    assert one == again and one.ids == few.ids and one.places[:3] == few.places and one.ids != other.ids
    assert few.places[0].name == "key_value/2400/0/10"
    assert load_haystack(text, encoder, tokenizer, LENGTH, 4).ids.tolist() != haystack.ids.tolist()
    more = [make_text("passkey", LENGTH, number, (0.5,), 100, haystack, encoder, 3) for number in range(8)]
    assert len({text.questions[0].answer for text in more}) == 8
    assert len({tuple(text.ids[: LENGTH // 4]) for text in more}) > 4  # other stretches of the text, too


def test_the_copier_gets_all_and_teacher_forcing_equals_generation(copier, text, data):
    """The oracle is right about facts in its memory alone, by both ways of asking, from text and from a dataset."""
    for source in (text, data):
        scores, _ = run_recall(copier(), (LENGTH,), trials=10, data=source)
        assert [s.value for s in scores] == [1.0] * len(scores)
        assert {(s.task, s.depth) for s in scores} >= {(t, d) for t in RECALL_EVAL_TASKS for d in (*DEPTHS, None)}
    memory = LENGTH * 5 // 8  # facts at depths of a half and more, and of some less
    forced, samples = run_recall(copier(memory), (LENGTH,), trials=10, data=text)
    generated, other = run_recall(copier(memory), (LENGTH,), trials=10, data=text, generated=True)
    assert forced == generated
    assert [(s.example, s.score) for s in samples] == [(s.example, s.score) for s in other]
    for task in RECALL_EVAL_TASKS:
        assert [value(forced, task, depth=d) for d in DEPTHS] == [0, 0, 1, 1, 1], task
    for score in (s for s in forced if s.metric == "exact" and s.depth is None and s.task != "mean"):
        of_task = [s for s in samples if s.task == score.task]  # five questions about a text, or ten, are no five texts
        assert score.stderr == mean_by_group([s.score for s in of_task], [s.group for s in of_task])[1]
    assert len({s.read_sha256 for s in samples}) == len(samples)  # of text and question
    assert value(forced, "several_needles", "all") == 0
    assert value(forced, "mean") == value(forced, "passkey") == 0.6
    for sample in other:
        assert (sample.output == sample.expected) == bool(sample.score)
        assert sample.prompt_end.endswith((" is", " stop", " card", "):"))


def test_all_of_a_text_is_measured_on_whole_texts_alone(copier, text):
    """Five of 7 trials are of one text, and two of a second, of which nobody knows whether all five would come back."""
    scores, _ = run_recall(copier(), (LENGTH,), tasks=("several_needles",), trials=7, data=text)
    counts = {s.metric: s.examples for s in scores if s.task == "several_needles" and s.depth is None}
    assert counts == {"exact": 7, "all": 1}


def test_ranks_share_the_texts_and_the_first_has_all_results(copier, text, monkeypatch):
    """Two ranks of a launch, one after the other, with what each gathers: the scores and samples of one process."""
    alone = run_recall(copier(1500), (LENGTH,), trials=10, data=text)
    parts: list[list] = []
    for rank in (1, 0):
        lm = copier(1500)
        lm._rank, lm._world_size = rank, 2
        monkeypatch.setattr(lm, "gather_object", lambda part, rank=rank: parts.append(part) or (None if rank else parts))
        found = run_recall(lm, (LENGTH,), trials=10, data=text)
        assert found == (([], []) if rank else alone)
    assert all(parts) and len(parts[0]) + len(parts[1]) == 13  # texts


def test_a_random_model_recalls_nothing_and_reads_a_text_for_all_its_questions(text, tokenizer):  # noqa: F811
    """Chance is 1 in 90,000; log-probabilities after a shared text are those of whole sequences."""
    model = tiny_hf_model("llama", vocab_size=len(tokenizer), max_position_embeddings=4096)
    lm = HyloLM(model, tokenizer, dtype="fp32")
    read = []
    model.register_forward_hook(lambda module, args, kwargs, out: read.append(kwargs["input_ids"].numel()), with_kwargs=True)
    scores, _ = run_recall(lm, (LENGTH,), tasks=("key_value",), trials=10, data=text)
    assert value(scores, "key_value") == 0
    assert sum(read) < 2 * LENGTH  # ten times that if each question read the text


def test_questions_after_a_shared_text_are_answered_as_after_a_text_of_their_own(text, tokenizer):  # noqa: F811
    """Right and wrong of a model that knows some tokens, question by question, against one pass over each whole sequence."""
    from megatron_hylo.eval.recall_ask import Question, teacher_forced

    model = tiny_hf_model("llama", vocab_size=len(tokenizer), max_position_embeddings=4096)
    lm = HyloLM(model, tokenizer, dtype="fp32")
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(2, 300, (size,), generator=generator).tolist() for size in (40, 37, 37)]
    asked, right = [], []
    for number, ids in enumerate(texts):
        questions = []
        for length in range(1, 2 + number * 2):
            question = torch.randint(2, 300, (3 + length,), generator=generator).tolist()
            answer: list[int] = []
            for _ in range(2):
                answer.append(int(model(torch.tensor([ids + question + answer])).logits[0, -1].argmax()))
            answer[1] += length % 2 * (1 if answer[1] < 299 else -1)
            questions.append(Question(question + answer, 2, ""))
            right.append(length % 2 == 0)
        asked.append(questions)
    found = teacher_forced(lm, texts, asked)
    assert [len(row) for row in found] == [1, 3, 5]
    assert [score for row in found for score in row] == right and any(right) and not all(right)


def test_a_fact_moves_to_the_next_edge_or_not_at_all():
    """To the nearer of two, and not as far as to one that is out of reach."""
    edges = np.array([0, 100, 130, 1000])
    assert [_edge(edges, place, 20) for place in (90, 118, 500, 150, 151, 985)] == [100, 130, 500, 130, 151, 1000]


def test_standard_errors_count_texts():
    """Ten equal answers of each of two texts say no more than two answers; single questions give the usual error."""
    assert mean_by_group([1.0] * 10 + [0.0] * 10, [0] * 10 + [1] * 10) == (0.5, pytest.approx(0.5))
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert mean_by_group(values, range(5)) == (0.6, pytest.approx(np.std(values, ddof=1) / 5**0.5))
    assert mean_by_group([1.0, 0.0], [4, 4]) == (0.5, None)


def test_perplexity_by_position_matches_logits(text, data, tokenizer):  # noqa: F811
    """Buckets hold the losses of their positions; of a model that knows nothing each is the vocabulary."""
    model = tiny_hf_model("llama", vocab_size=len(tokenizer), max_position_embeddings=4096)
    lm = HyloLM(model, tokenizer, dtype="fp32")
    scores, samples = run_by_position(lm, (64, 16, 200), 2, data=data)
    assert [s.length for s in scores] == [16, 64, 200] and len(samples) == 6
    from megatron_hylo.data.packed import DocumentStore

    store = DocumentStore(data / "heldout")
    longest = np.argsort(-store.lengths, kind="stable")[:2]
    losses = []
    for number in longest.tolist():
        ids = torch.tensor([store.read(number, 0, 200)])
        losses.append(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    stacked = torch.stack(losses).detach()
    for score, (low, high) in zip(scores, ((0, 15), (15, 63), (63, 199))):
        assert score.value == pytest.approx(stacked[:, low:high].mean().exp().item(), rel=1e-4)
    lm.max_length = 100
    scores, _ = run_by_position(lm, (64, 16, 200), 2, data=data)
    assert [s.note for s in scores] == ["", "", "past the model's window of 100"]
    torch.nn.init.zeros_(model.lm_head.weight)
    for source, joined in ((text, "2 of 2"), (data, "")):
        scores, _ = run_by_position(lm, (100, 4000 if joined else 200), 2, data=source)
        assert [s.value for s in scores] == pytest.approx([len(tokenizer)] * 2, rel=1e-4)
        assert scores[-1].note.startswith(joined)


def test_what_cannot_be_measured_is_refused(copier, text, data, tokenizer, tmp_path):  # noqa: F811
    """Each sentence says what to give instead."""
    run = run_recall
    with pytest.raises(ConfigError, match="recall has no task riddle; give some of passkey"):
        run(copier(), (LENGTH,), tasks=("riddle",), data=text)
    with pytest.raises(ConfigError, match="depths between 0 and 1"):
        run(copier(), (LENGTH,), (2.0,), data=text)
    with pytest.raises(ConfigError, match="length 300: the facts of key_value .* give lengths of at least [0-9,]+$"):
        run(copier(), (300,), tasks=("key_value",), data=text)
    short = copier()
    short.max_length = 1000
    with pytest.raises(ConfigError, match="recall at 2,400 tokens is past the model's window of 1,000"):
        run(short, (LENGTH,), data=text, generated=True)
    scores, _ = run(short, (LENGTH,), tasks=("passkey",), trials=1, data=text)
    assert scores[0].note == "past the model's window of 1,000"
    one = next(iter(text.iterdir()))
    scores, _ = run(copier(), (LENGTH,), tasks=("passkey",), trials=2, data=one)
    assert re.match("text repeated, it has [1-9],?[0-9]* tokens", scores[0].note) and scores[0].value == 1
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    other = copier()
    other.tokenizer = type(tokenizer)(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|im_end|>")
    with pytest.raises(
        ConfigError, match="was made with another tokenizer than the model's: id [0-9]+ is 'a' in .* and 'e' in"
    ):
        run(other, (LENGTH,), data=data)
