"""The suites of an evaluation: each is planned, which refuses what cannot work, before the first one runs."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_hylo.config import ConfigError
from megatron_hylo.config.evaluation import Suite, SuiteSettings
from megatron_hylo.data.artefacts import fetch_essays, fetch_questions
from megatron_hylo.data.packed import DocumentStore
from megatron_hylo.eval import commonsense, perplexity_positions, recall, suites_ppl
from megatron_hylo.eval.parts import Part, run_part
from megatron_hylo.eval.results import Found, Sample, Score
from megatron_hylo.eval.ruler import run as ruler
from megatron_hylo.io.progress import Track, no_progress

logger = logging.getLogger("megatron_hylo.eval")
RULER_EXAMPLES = 500  # of a task and length, as published
Plan = Callable[[Part], Found]


def run_suites(lm: Any, settings: SuiteSettings, track: Track = no_progress, part: Part = run_part) -> Found:
    """Run suites one after the other.

    Args:
        lm: `HyloLM`.
        settings: which, and what they measure.
        track: progress display over the suites.
        part: runs a part of a suite, or knows its results: a suite, recall at a length, a million tokens of RULER.

    Returns:
        All scores and samples; none on other ranks than the first.

    Raises:
        ConfigError: something that a suite cannot do, before any of them begins.
    """
    plans = [(name, _PLANS[name](lm, settings, track)) for name in settings.suites]
    scores: list[Score] = []
    samples: list[Sample] = []
    for name, plan in track(plans, ", ".join(settings.suites)):
        logger.info("suite %s", name)
        found = plan(part)
        scores += found[0]
        samples += found[1]
    return scores, samples


def fetch_inputs(settings: SuiteSettings) -> None:
    """Download what the suites read, where it is not in the cache, before ranks are joined: one of them does for all."""
    wanted: dict[str, Callable[[], Path]] = {"commonsense": fetch_questions, "gsm8k": fetch_questions}
    if settings.essays is None:
        wanted["ruler"] = fetch_essays
    for name, fetch in wanted.items():
        if name in settings.suites and not settings.online:
            try:
                fetch()
            except ConfigError as error:  # lm-eval's own data may be in the cache, and RULER has tasks without essays
                logger.warning("%s", error)


def _lengths(lm: Any, settings: SuiteSettings, own: Sequence[int], most: int | None = None) -> list[int]:
    """Lengths asked for, else a suite's own up to what the model was trained for, and `most`."""
    if settings.lengths is not None:
        return sorted(set(settings.lengths))
    return [length for length in own if length <= min(lm.max_length, most or lm.max_length)]


def _plan_ppl(lm: Any, settings: SuiteSettings, track: Track) -> Plan:
    data = settings.data
    assert data is not None, "SuiteSettings refuses the suite without"
    windows, documents = suites_ppl.read_windows(lm, data, settings.sequence_length, settings.limit)
    longest = int(DocumentStore(Path(data) / "heldout").lengths.max())
    lengths = _lengths(lm, settings, recall.LENGTHS, longest)
    count = min(settings.limit or perplexity_positions.WINDOWS, perplexity_positions.WINDOWS)

    def measure() -> Found:
        """Measure perplexity on the held-out windows and, where there are lengths, by position."""
        scores, samples = suites_ppl.run_heldout(lm, windows, documents, track)
        if lengths:
            more = perplexity_positions.run_by_position(lm, lengths, count, data=data, seed=settings.seed, track=track)
            scores, samples = scores + more[0], samples + more[1]
        return scores, samples

    return lambda part: part("ppl", measure)


def _plan_recall(lm: Any, settings: SuiteSettings, track: Track) -> Plan:
    lengths, data = _lengths(lm, settings, recall.LENGTHS), settings.data
    assert data is not None, "SuiteSettings refuses the suite without"
    if not Path(data).exists():
        raise ConfigError(f"{data} does not exist; give a dataset folder or text files to hide facts in")
    if settings.generated and max(lengths) > lm.max_length:
        raise ConfigError(
            f"recall at {max(lengths):,} tokens with written answers is past the model's window of {lm.max_length:,}; give "
            f"smaller lengths, or a larger max_length"
        )
    recall.check_room(lm, lengths, settings.limit or recall.TRIALS, settings.seed)
    return lambda part: recall.run_recall(
        lm, lengths, trials=settings.limit or recall.TRIALS, data=data, generated=settings.generated, seed=settings.seed,
        track=track, part=part,
    )  # fmt: skip


def _plan_ruler(lm: Any, settings: SuiteSettings, track: Track) -> Plan:
    lengths = _lengths(lm, settings, ruler.LENGTHS)
    if not lengths or max(lengths) > lm.max_length:
        raise ConfigError(
            f"RULER at {max(lengths or ruler.LENGTHS[:1]):,} tokens is longer than this model's window of {lm.max_length:,}: "
            f"prompts would be cut and lose what is asked for; give --lengths up to that, a --suite without ruler, or a larger "
            f"--max_length"
        )
    if settings.chat and not lm.tokenizer.chat_template:
        raise ConfigError("RULER in a chat template: the model's tokenizer has none; leave --chat out")
    qa = {name: path for name, path in (("squad", settings.squad), ("hotpot", settings.hotpot)) if path is not None}
    for path in (*qa.values(), *([settings.essays] if settings.essays else [])):
        if not Path(path).exists():
            raise ConfigError(f"{path} does not exist; RULER reads its questions and its haystack from local files")
    return ruler.plan_ruler(
        lm, lengths, limit=settings.limit or RULER_EXAMPLES, seed=settings.seed, essays=settings.essays, qa=qa,
        chat=settings.chat, track=track,
    )  # fmt: skip


def _plan_commonsense(lm: Any, settings: SuiteSettings, track: Track) -> Plan:
    tasks = commonsense.load_tasks(commonsense.COMMONSENSE, settings.online)
    return lambda part: part("commonsense", partial(commonsense.run_commonsense, lm, tasks, settings.limit, track))


def _plan_gsm8k(lm: Any, settings: SuiteSettings, track: Track) -> Plan:
    if lm.max_length <= lm.max_gen_toks:
        raise ConfigError(
            f"GSM8K's answers have up to {lm.max_gen_toks} tokens and leave no room for a prompt in this model's window of "
            f"{lm.max_length:,}; give a larger --max_length, or a --suite without gsm8k"
        )
    tasks = commonsense.load_tasks(["gsm8k"], settings.online)
    return lambda part: part("gsm8k", partial(commonsense.run_gsm8k, lm, tasks, settings.limit, track))


_PLANS: dict[Suite, Callable[[Any, SuiteSettings, Track], Plan]] = {
    "ppl": _plan_ppl,
    "recall": _plan_recall,
    "ruler": _plan_ruler,
    "commonsense": _plan_commonsense,
    "gsm8k": _plan_gsm8k,
}
