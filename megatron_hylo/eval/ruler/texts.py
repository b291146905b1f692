"""Text of single RULER examples at a chosen size, made by lm-eval's own generators.

lm-eval finds the size (words of essay, lines, documents, ...) in coarse steps, tokenising again and again; here a size is an
argument, and `fit.py` finds it. The draws are lm-eval's: with the same random state and size the text is the same.
"""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from megatron_hylo.eval.ruler.sources import Haystack, Questions, generators, seeded

NIAH: dict[str, dict[str, Any]] = {
    "niah_single_1": {"type_haystack": "repeat", "type_needle_k": "words", "type_needle_v": "numbers"},
    "niah_single_2": {"type_haystack": "essay", "type_needle_k": "words", "type_needle_v": "numbers"},
    "niah_single_3": {"type_haystack": "essay", "type_needle_k": "words", "type_needle_v": "uuids"},
    "niah_multikey_1": {"type_haystack": "essay", "type_needle_k": "words", "type_needle_v": "numbers", "num_needle_k": 4},
    "niah_multikey_2": {"type_haystack": "needle", "type_needle_k": "words", "type_needle_v": "numbers"},
    "niah_multikey_3": {"type_haystack": "needle", "type_needle_k": "uuids", "type_needle_v": "uuids"},
    "niah_multivalue": {"type_haystack": "essay", "type_needle_k": "words", "type_needle_v": "numbers", "num_needle_v": 4},
    "niah_multiquery": {"type_haystack": "essay", "type_needle_k": "words", "type_needle_v": "numbers", "num_needle_q": 4},
}
QA = {"qa_1": "squad", "qa_2": "hotpot"}
TASKS = (*NIAH, "vt", "cwe", "fwe", *QA)  # RULER's names; lm-eval puts ruler_ before some
NEEDS_ESSAYS = tuple(name for name, options in NIAH.items() if options["type_haystack"] == "essay")
UNLIMITED = 2**31

Example = dict[str, Any]  # "input", "outputs", "gen_prefix", "max_length": what lm-eval's tasks read


@dataclass(frozen=True)
class Texts:
    """Examples of one task at one length.

    Args:
        make: (number of the example, size) -> example; draws from the global random state.
        least: smallest size that holds the answer, by number of the example.
        most: largest size that the sources allow.
        source: what ends there, for messages.
        examples: how many examples there can be.
    """

    make: Callable[[int, int], Example]
    least: Callable[[int], int]
    most: int = UNLIMITED
    source: str = ""
    examples: int = UNLIMITED


def texts_of(task: str, length: int, seed: int, tokenizer: Any, essays: Haystack | None, qa: dict[str, Questions]) -> Texts:
    """Return the generator of a task.

    Args:
        task: a name out of `TASKS`.
        length: tokens of the context; some tasks' distribution depends on it.
        seed: of the example that precedes the prompts of vt.
        tokenizer: of the model; vt sizes that example with it.
        essays, qa: what the task needs of them.
    """
    modules = generators()
    if task in NIAH:
        return _niah(modules, NIAH[task], length, essays)
    if task == "vt":
        return _variable_tracking(modules.vt_utils, length, seed, tokenizer)
    if task == "cwe":
        return _common_words(modules.cwe_utils, length)
    if task == "fwe":
        return _frequent_words(modules.fwe_utils, length)
    return _questions(modules.qa_utils, length, qa[QA[task]])


def _niah(modules: SimpleNamespace, options: dict[str, Any], length: int, essays: Haystack | None) -> Texts:
    values, asked = options.get("num_needle_v", 1), options.get("num_needle_q", 1)
    keys = max(options.get("num_needle_k", 1), asked)
    arguments = options | {"num_needle_k": keys, "num_needle_v": values, "template": modules.niah_utils.TEMPLATE}
    essay = options["type_haystack"] == "essay"
    assert essays is not None or not essay
    haystack = essays.words if essay and essays else modules.prepare_niah.get_haystack(options["type_haystack"])
    kind = options["type_needle_v"]

    def make(index: int, size: int) -> Example:
        """Hide needles in a haystack of `size` words of essays, lines or needles, by lm-eval's generator."""
        text, answers, query = modules.prepare_niah.generate_input_output(size, haystack, **arguments)
        noun, verb = (kind[:-1], "is") if asked * values == 1 else (kind, "are")
        prefix = f"The special magic {noun} for {query} mentioned in the provided text {verb}"
        return _example(text, answers, prefix, length)

    if essay and essays:
        return Texts(make, lambda index: keys * values, len(haystack), f"the essays ({essays.name}, {len(haystack):,} words)")
    return Texts(make, lambda index: keys * values)


def _variable_tracking(module: Any, length: int, seed: int, tokenizer: Any) -> Texts:
    quiet = io.StringIO()  # it prints its search
    with seeded(seed, "vt", length, "shot"), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        shot = module.sys_vartrack_w_noise_random(tokenizer=tokenizer, num_samples=1, max_seq_length=500, incremental=5)[0]
    solved = shot["input"] + " " + " ".join(shot["outputs"]) + "\n\n"
    start = module.CONFIG["variable_tracking"]["template"][:20]

    def make(index: int, size: int) -> Example:
        """Hide a chain of assignments in `size` sentences of noise, after a solved example in the same form."""
        text, answers = module.generate_input_output(size, 1, 4, is_icl=False)
        cut = text.index(start)
        text = text[:cut] + module.randomize_icl(solved) + "\n\n" + text[cut:]
        end = text.rfind(" Answer: According to the chain(s) of variable assignment")
        return _example(text[:end], answers, text[end:].strip(), length)

    return Texts(make, lambda index: 6)  # more sentences than assignments: none is cut


def _common_words(module: Any, length: int) -> Texts:
    def make(index: int, size: int) -> Example:
        """List words of which `size` are different; the ten that come most often are asked for."""
        _, text, answers = module.generate_input_output(size, length)
        prefix = module.CONFIG["answer_prefix"]
        return _example(text[: text.rfind(prefix)].strip(), answers, prefix.strip(), length)

    return Texts(make, lambda index: 11, len(module.WORDS), f"lm-eval's list of {len(module.WORDS):,} words")


def _frequent_words(module: Any, length: int) -> Texts:
    def uncounted(text: str) -> SimpleNamespace:
        """Stand for a tokenizer that counts no token: the generator is not to shrink the text, whose size is chosen here."""
        return SimpleNamespace(input_ids=())

    def make(index: int, size: int) -> Example:
        """Write `size` invented words, drawn from a distribution of which the three most frequent are asked for."""
        text, answers, _ = module.generate_input_output(length, uncounted, num_words=size, vocab_size=length // 50)
        prefix = module.CONFIG["answer_prefix"]
        return _example(text[: text.rfind(prefix)].strip(), answers, prefix.strip(), length)

    return Texts(make, lambda index: 75)  # the fourth word occurs more often than the fifth: 2 times and once


def _questions(module: Any, length: int, qa: Questions) -> Texts:
    def make(index: int, size: int) -> Example:
        """Put question `index` behind `size` documents, its own among them."""
        text, answers = module.generate_input_output(index, size, qas=qa.questions, docs=qa.documents)
        return _example(text, answers, "Answer:", length)

    return Texts(
        make,
        lambda index: len(qa.questions[index]["context"]),
        len(qa.documents) - 1,  # with all of them lm-eval's generator reorders its own list
        f"{qa.name} ({len(qa.documents):,} documents)",
        len(qa.questions),
    )


def _example(text: str, answers: list[str], prefix: str, length: int) -> Example:
    return {"input": text, "outputs": answers, "gen_prefix": prefix, "max_length": length}
