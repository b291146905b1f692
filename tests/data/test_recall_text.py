"""Wording of recall exercises: one answer a question, much variety, and all kinds of names and values."""

import random
import re
from collections import Counter
from string import Formatter

import pytest

from megatron_hylo.config.recall import RECALL_TASKS
from megatron_hylo.data.recall_text import ASKED_TOGETHER, ECHOED, LED_IN, Exercises
from megatron_hylo.data.recall_wording import (
    ECHOES,
    ENDS,
    EVENTS,
    FACT_FRAMES,
    FACTS,
    LEAD_INS,
    NOUNS,
    PASSKEYS,
    PEOPLE,
    QUESTION_FRAMES,
    RESTATED_QUESTION_FRAMES,
    SECRETS,
    TEMPLATES,
    listed,
    plural,
    with_article,
)
from tests.data.recall_facts import answers_of, parse_fact, plain_key

STYLES = {
    "plain": r"[a-z]+ [a-z]+( of [A-Z][a-z]+)?", "number": "[a-z]+ [0-9]{3}", "hyphens": r"[a-z]+(-[a-z]+)+",
    "underscores": r"[a-z]+(_[a-z]+)+", "camel case": r"[a-z]+([A-Z][a-z]+)+",
}  # fmt: skip
VALUES = {
    "digits": "[1-9][0-9]{2,8}", "code": "[A-Z]{2,3}-[0-9]{3,4}", "pair": rf"({'|'.join(PEOPLE)}) and ({'|'.join(PEOPLE)})",
    "words": "[a-z]+ [a-z]+", "hexadecimal": "[0-9a-f]{6,12}",
}  # fmt: skip


def kinds(patterns, texts) -> Counter[str]:
    """How many of the texts are of each kind; all are of one."""
    return Counter(next(name for name, pattern in patterns.items() if re.fullmatch(pattern, text)) for text in texts)


def as_pattern(template: str) -> re.Pattern[str]:
    """A pattern of all texts that a fact's or a question's template can become, up to the answer and a lead-in."""
    key, value = r"(the |The )?[\w-]+( [\w-]+)*", r"[\w-]+( [\w-]+)*"
    words = dict.fromkeys(("key", "the", "The", "name", "source"), key) | {"value": value}
    words |= {"noun": "|".join(NOUNS), "nouns": "|".join(map(plural, NOUNS)), "a": "|".join(map(with_article, NOUNS))}
    words |= {"event": "|".join(EVENTS), "all": rf"{key}(, {key})*( and {key})?"}
    words |= dict.fromkeys(("secret", "Secret"), f"(?i:{'|'.join(map(re.escape, SECRETS))})")
    parts = Formatter().parse(template.partition("{answer}")[0].rstrip(" :\n\t"))
    return re.compile("".join(re.escape(text) + (f"({words[name]})" if name else "") for text, name, _, _ in parts))


@pytest.mark.parametrize("task", RECALL_TASKS)
def test_all_that_exercises_say_is_in_the_templates(task):
    """A wording outside of TEMPLATES would be compared with no sentence of an evaluation."""
    told = [as_pattern(template) for template in TEMPLATES]
    exercises = Exercises(random.Random(8))
    for _ in range(200):
        made = exercises.make(task, 6)
        for fact in made.facts:
            assert any(pattern.fullmatch(text) for pattern in told for text in (fact, fact[0].lower() + fact[1:])), fact
        for question in made.questions:
            text = re.sub(r"[:\s]*(- |\* |1[.)] )?$", "", question.text)
            assert any(pattern.fullmatch(text) for pattern in told), question


def test_no_thing_of_a_window_has_two_values():
    """(Noun, thing) and secrets, however the thing's name is written, are drawn without replacement."""
    secrets = {plain_key(secret) for secret in SECRETS}
    for seed in range(4):
        exercises = Exercises(random.Random(seed))
        lines = [fact for _ in range(400) for task in ("passkey", "several_keys", "key_value")
                 for fact in exercises.make(task, 6).facts]  # fmt: skip
        lines += [exercises.fact() for _ in range(100)]
        parsed = [parse_fact(line) for line in lines]
        assert None not in parsed
        names = [plain_key(parts.name) for _, parts in parsed]  # stricter: not even with another noun
        assert len(names) == len(set(names)) > 2000
        assert sum(plain_key(parts.name) in secrets for _, parts in parsed) == len(secrets) == len(SECRETS)
        assert sum(fact in PASSKEYS for (fact, _), _ in parsed) == len(PASSKEYS)


def test_a_question_names_what_its_fact_is_about():
    """The thing as the fact writes it, the noun of a composed fact, or the secret; and the answer is the fact's value."""
    exercises = Exercises(random.Random(5))
    for number in range(1500):
        made = exercises.make(("key_value", "several_keys", "passkey")[number % 3], 5)
        for question in made.questions:
            facts = [parse_fact(fact) for fact in made.facts[question.fact :][: max(made.ordered, 1)]]
            values = answers_of(question.answer)
            assert sorted(values) == sorted(parts.value for _, parts in facts)
            text = question.text.lower()
            names = {parts.value: parts.name.lower() for _, parts in facts}
            for (fact, noun), parts in facts:
                assert fact in PASSKEYS or names[parts.value] in text
                if fact in FACT_FRAMES:
                    assert re.search(rf"\b{noun if len(facts) == 1 else plural(noun)}\b", text)
            if len(values) > 1:  # the values in the order of the names
                assert listed([names[value] for value in values]) in re.sub(r"\bthe ", "", text)
            assert not re.search(r"[{}]\w*[{}]", question.text + question.rest)  # no placeholder is left


def test_wordings_are_thousands():
    """Any noun, fact and question go together; of a thousand composed exercises hardly two are worded alike."""
    assert len(NOUNS) >= 40 and len(FACT_FRAMES) >= 15 and len(QUESTION_FRAMES) >= 20
    exercises = Exercises(random.Random(6))
    wordings, echoes, able = [], 0, 0
    for _ in range(1300):
        made = exercises.make("key_value", 2)
        (question,) = made.questions
        wording, parts = parse_fact(made.facts[0])
        if wording[0] in FACT_FRAMES:
            wordings.append((wording, question.text.lower().replace(parts.name.lower(), ""), question.rest))
        able += wording[0] in ECHOES
        echoes += made.facts[0].startswith(question.text)
    assert len(wordings) > 950
    assert len(set(wordings)) > 0.93 * len(wordings)
    assert len(FACTS) * 0.6 < len(ECHOES)
    assert 0.8 * ECHOED < echoes / able < 1.2 * ECHOED  # a fact's own first words


def test_several_things_are_asked_for_in_one_question():
    """Half of the exercises of several keys that can: a question of all names, in another order than the facts."""
    exercises, together, apart, turned = Exercises(random.Random(11)), 0, 0, 0
    for _ in range(600):
        made = exercises.make("several_keys", 5)
        if made.ordered > 1:
            (question,) = made.questions
            together += 1
            values = [parse_fact(fact)[1].value for fact in made.facts[: made.ordered]]
            turned += answers_of(question.answer) != values
        else:
            apart += (
                len(made.questions) > 1 and parse_fact(made.facts[0])[0][1] != "" and " and " not in made.questions[0].answer
            )
    assert 0.8 * ASKED_TOGETHER < together / (together + apart) < 1.2 * ASKED_TOGETHER
    assert 0.4 < turned / together < 0.9


def test_answers_follow_at_once_or_after_a_lead_in_and_several_in_lines():
    """Two fifths of the questions that end in one of ENDS break the line or begin a list; several values have a line each."""
    exercises = Exercises(random.Random(12))
    texts, lines, sentences = [], 0, 0
    for _ in range(800):
        texts += [question.text for question in exercises.make("key_value", 2).questions]
        (question,) = exercises.make("several_values", 4).questions
        if "\n" in question.answer:
            lines += 1
            first = re.fullmatch(r"[^\n].*:\n\n?([-*] |1[.)] |)", question.text, re.DOTALL)
            assert first and question.rest == "\n"
            values = answers_of(question.answer)  # the first line's mark is no part of the answer
            marks = [first[1].replace("1", str(number)) for number in range(2, len(values) + 1)]
            assert question.answer.split("\n") == [values[0], *map("".join, zip(marks, values[1:], strict=True))]
        else:
            sentences += question.text.endswith(ENDS)
    led = sum(text.endswith(LEAD_INS) and not text.endswith(ENDS) for text in texts)
    led /= led + sum(text.endswith(ENDS) for text in texts)
    assert 0.75 * LED_IN < led < 1.1 * LED_IN  # less where a lead-in is itself one of ENDS
    assert 0.8 * LED_IN < lines / (lines + sentences) < 1.2 * LED_IN


def test_restated_questions_come_again_before_the_answer():
    """Each names noun and thing twice, the second time before the answer; of composed exercises a fifth are asked so."""
    for frame in RESTATED_QUESTION_FRAMES:
        question = frame.split("{answer}")[0]
        assert question.count("{noun}") == 2 and len(re.findall(r"\{[tT]he\}", question)) == 2, frame
    exercises, restated = Exercises(random.Random(9)), []
    for _ in range(900):
        made = exercises.make("key_value", 2)
        (fact, noun), _ = parse_fact(made.facts[0])
        if fact in FACT_FRAMES:
            restated.append(len(re.findall(rf"\b{noun}\b", made.questions[0].text)) == 2)
    assert 0.15 < sum(restated) / len(restated) < 0.35


def test_a_noun_has_the_article_that_it_takes():
    """No `a alias`: facts and questions about several values of any noun."""
    exercises = Exercises(random.Random(10))
    made = [exercises.make("several_values", 3) for _ in range(500)]
    texts = " ".join(text for one in made for text in (*one.facts, *(question.text for question in one.questions)))
    assert re.search(r"\ban (alias|entry|index) ", texts) and re.search(r"\ba (tag|seal|lot) ", texts)
    assert not re.findall(r"\b[Aa] [aeiou]\w*|\b[Aa]n [^aeiou]\w*", texts)


def test_names_and_values_are_of_all_kinds():
    exercises = Exercises(random.Random(7))
    parsed = [parse_fact(fact)[1] for _ in range(1400) for fact in exercises.make("key_value", 2).facts]
    names = kinds(STYLES, (parts.name for parts in parsed))
    assert 600 < names["plain"] < 800 and all(names[style] > 120 for style in STYLES)
    values = kinds(VALUES, (parts.value for parts in parsed))
    assert 500 < values["digits"] < 700 and all(values[kind] > 140 for kind in VALUES)


def test_things_of_an_exercise_are_told_alike():
    """One frame, noun, style of names and kind of values, so that nothing but the name tells which is asked for."""
    exercises = Exercises(random.Random(8))
    for _ in range(300):
        parsed = [parse_fact(fact) for fact in exercises.make("several_keys", 12).facts]
        assert len({wording for wording, _ in parsed}) == 1
        assert len(kinds(STYLES, (parts.name for _, parts in parsed))) == 1
    alike = [[parse_fact(f)[1].name for f in exercises.make("several_keys", 12).facts] for _ in range(600)]
    numbered = [{name.split()[0] for name in names} for names in alike if names[0].split()[-1].isdigit()]
    assert 0.25 < sum(len(things) == 1 for things in numbered) / len(numbered) < 0.75  # half: kiln 418, kiln 481


def test_keys_of_an_exercise_are_often_alike():
    """A third of the sets share all words but one, a third are of a few words in all; no key is drawn twice."""
    exercises = Exercises(random.Random(1))
    sets = [exercises._keys(6) for _ in range(200)]
    words = [[set(key.split()) for key in keys] for keys in sets]
    differing = [len(set.union(*keys) - set.intersection(*keys)) for keys in words]  # in how many words a set's keys differ
    assert 40 < sum(count == 6 for count in differing) < 95
    assert 40 < sum(count > 6 and len(set.union(*keys)) <= 4 + 4 + 2 for count, keys in zip(differing, words)) < 110
    drawn = [key for keys in sets for key in keys]
    assert len(drawn) == len(set(drawn))


def test_numbers_of_all_lengths_are_drawn():
    exercises = Exercises(random.Random(2))
    lengths = [len(exercises._digits()) for _ in range(700)]
    assert all(60 < lengths.count(digits) < 140 for digits in range(3, 10))
