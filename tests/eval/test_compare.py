"""Differences between models against arithmetic by hand and scipy, and what is on the pages about them."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from megatron_hylo.cli.compare import compare as compare_verb
from megatron_hylo.config import ConfigError
from megatron_hylo.eval.compare import Quantity, compare, estimate
from megatron_hylo.eval.compare_page import difference_rows
from megatron_hylo.eval.intervals import constant_difference, degrees_of_mean, t95, wilson
from megatron_hylo.eval.plots import LIGHT, draw_buckets
from megatron_hylo.eval.results import EvalResult, Sample, Score, mean, mean_by_group
from megatron_hylo.eval.results_page import length_name, write_report
from tests.cli.test_report import loaded
from tests.eval.results import make_result, scored, write_results


def answers(scores: list[float], task: str = "vt", **more) -> list[Sample]:
    """Samples of one task at 4K with these scores."""
    length = more.pop("length", 4096)
    return [
        Sample("ruler", task, "match", str(i), score, length, expected=f"answer {i}", **more) for i, score in enumerate(scores)
    ]


def result(*tasks: list[Sample], name: str = "model") -> EvalResult:
    """An evaluation of samples, with the mean of its tasks."""
    scores = [scored(samples) for samples in tasks]
    every = [sample for samples in tasks for sample in samples]
    return EvalResult({"name": name}, {}, scores + ([mean(scores)] if len(scores) > 1 else []), every)


def row(rows, task: str = "vt"):
    """The row of one task."""
    return next(row for row in rows if row.quantity.task == task)


def test_a_paired_difference_equals_arithmetic_by_hand():
    """Differences 0, 0, -1, -1, 0, 1: mean -1/6, squared deviations 17/6, so a standard error of sqrt(17/6 / 5 / 6)."""
    ours, theirs = answers([1, 0, 1, 1, 0, 0]), answers([1, 0, 0, 0, 0, 1])
    found = row(compare([result(ours), result(theirs)])).differences[1]
    assert found.value == pytest.approx(-1 / 6)
    assert found.stderr == pytest.approx(math.sqrt(17 / 6 / 5 / 6))
    assert found.low == pytest.approx(-1 / 6 - 2.570582 * found.stderr, abs=1e-3)  # Student's t of 5 degrees of freedom
    assert (found.examples, found.only_baseline, found.only_model, found.better) == (6, 0, 0, None)


def test_a_paired_interval_equals_scipys():
    scipy = pytest.importorskip("scipy.stats")
    one, other = make_result("one", 0.9, examples=30), make_result("other", 0.4, examples=30)
    for quantity in (Quantity("ruler", "cwe", "match", 4096), Quantity("gsm8k", "gsm8k", "exact_match")):
        found = next(r for r in compare([one, other]) if r.quantity == quantity).differences[1]
        pairs = [
            [s.score for s in r.samples if (s.task, s.length or 0) == (quantity.task, quantity.length)] for r in (one, other)
        ]
        truth = scipy.ttest_rel(*pairs[::-1]).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((truth.low, truth.high), abs=1e-6)
        assert found.better is (None if truth.low <= 0 <= truth.high else bool(truth.low > 0))


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 29, 999])
def test_quantiles_and_proportions_equal_scipys(degrees):
    scipy = pytest.importorskip("scipy.stats")
    assert t95(degrees) == pytest.approx(scipy.t.ppf(0.975, degrees), rel=1e-3)
    assert t95(degrees + 0.5) <= t95(degrees)
    for right in (0, 1, degrees // 2, degrees):
        truth = scipy.binomtest(right, degrees).proportion_ci(0.95, "wilson")
        assert wilson(right / degrees, degrees) == pytest.approx((truth.low, truth.high), abs=1e-9)


def test_examples_that_are_not_the_same_are_counted_and_not_paired():
    """One of six is missing, one has another right answer, and the other model has two more."""
    ours, theirs = answers([1, 0, 1, 1, 0, 0]), answers([0, 0, 0, 0, 0, 0, 1, 1])[1:]
    theirs[0] = replace(theirs[0], expected="another")
    found = row(compare([result(ours), result(theirs)])).differences[1]
    assert (found.examples, found.only_baseline, found.only_model) == (4, 2, 3)
    assert (found.value, found.low) == (-0.5, None)  # four pairs are too few for an interval


@pytest.mark.parametrize("change", [dict(length=8192), dict(depth=0.5), dict(task="cwe"), dict(metric="other")])
def test_examples_of_other_tasks_lengths_and_depths_are_not_the_same(change):
    ours = answers([1.0] * 6)
    theirs = [replace(sample, **change) for sample in ours]
    for found in compare([result(ours), result(theirs)]):
        assert found.differences == [None, None]


def test_two_examples_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="model have two examples '0' of ruler vt"):
        compare([result(answers([1.0]) * 2), result(answers([1.0]))])


def test_examples_of_one_text_are_not_independent():
    """Two texts of four questions, all alike in each: the error is that of two numbers, 0 and 1."""
    values, groups = [0.0] * 4 + [1.0] * 4, ["a"] * 4 + ["b"] * 4
    assert mean_by_group(values, groups) == (0.5, pytest.approx(0.5))
    assert mean_by_group(values, list("abcdefgh"))[1] == pytest.approx(math.sqrt(0.25 * 8 / 7 / 8))
    assert mean_by_group([1.0, 0.0], ["a", "a"])[1] is None
    by_text = [replace(sample, group=f"text {i // 2}") for i, sample in enumerate(answers([0.0, 0.0, 1.0, 1.0] * 5))]
    found = row(compare([result(answers([1.0] * 20)), result(by_text)])).differences[1]
    assert found.stderr == pytest.approx(mean_by_group([-1.0, 0.0] * 5, list("abcdefghij"))[1])
    assert found.high - found.value == pytest.approx(t95(9) * found.stderr)  # of ten texts
    few = [replace(sample, group=f"text {i // 5}") for i, sample in enumerate(by_text)]
    assert row(compare([result(answers([1.0] * 20)), result(few)])).differences[1].low is None  # four texts


def test_a_means_difference_is_that_of_its_tasks():
    """Errors of two tasks add as squares; where one model was asked other tasks there is none."""
    ours = result(answers([1, 0, 1, 1, 0, 0]), answers([1, 1, 1, 1, 0, 0], "cwe"))
    theirs = result(answers([0, 0, 0, 1, 0, 0]), answers([1, 0, 1, 0, 1, 0], "cwe"))
    rows = compare([ours, theirs])
    parts = [row(rows, task).differences[1] for task in ("vt", "cwe")]
    found = row(rows, "mean").differences[1]
    assert found.value == pytest.approx((parts[0].value + parts[1].value) / 2)
    assert found.stderr == pytest.approx(math.hypot(parts[0].stderr, parts[1].stderr) / 2)
    assert found.examples == 12
    for one in (ours, theirs):  # the mean is of acc_norm, of the other metric where a task does not have that
        one.scores[1:2] = [replace(one.scores[1], metric="acc"), replace(one.scores[1], metric="acc_norm")]
        one.scores[1] = replace(one.scores[1], value=0.1)
        one.scores[-1] = replace(one.scores[-1], metric="acc_norm")
        one.samples = [replace(s, metric="acc_norm") if s.task == "cwe" else s for s in one.samples]
    assert row(compare([ours, theirs]), "mean").differences[1] == found
    theirs.scores[-1] = replace(theirs.scores[-1], value=0.9)  # a mean that its tasks do not have
    assert row(compare([ours, theirs]), "mean").differences[1] is None
    other = result(answers([0, 0, 0, 1, 0, 0]), answers([1, 0, 1, 0, 1, 0], "fwe"))
    assert row(compare([ours, other]), "mean").differences[1] is None


def test_degrees_of_freedom_of_a_mean_are_those_of_welchs_test():
    """A mean of two tasks has scipy's degrees; one whose error is mostly that of a task of few texts has about that task's."""
    scipy = pytest.importorskip("scipy.stats")
    one, other = [0.1, 0.5, 0.9, 0.4], [0.2, 0.3, 0.2, 0.4, 0.3, 0.1, 0.2]
    errors = [mean_by_group(values, range(len(values)))[1] for values in (one, other)]
    truth = scipy.ttest_ind(one, other, equal_var=False).df
    assert degrees_of_mean(errors, [len(one), len(other)]) == pytest.approx(truth)
    assert degrees_of_mean([0.01, 0.3], [100, 2]) == pytest.approx(1, abs=1e-2)
    assert degrees_of_mean([0.0, 0.0], [100, 2]) == 1


def test_a_mean_is_no_surer_than_its_tasks():
    """Three texts of ten questions are three observations, in the mean's interval and in that of its difference."""
    sure = answers([1.0, 0.0] * 20)
    unsure = [replace(s, group=f"text {i // 10}") for i, s in enumerate(answers([1.0] * 15 + [0.0] * 15, "cwe"))]
    zeros = result(answers([0.0] * 40), answers([0.0] * 30, "cwe"))
    found = row(compare([result(sure, unsure), zeros]), "mean")
    parts = [scored(samples) for samples in (sure, unsure)]
    half = t95(degrees_of_mean([part.stderr for part in parts], [40, 3])) * found.values[0].stderr
    assert half > 2 * 1.96 * found.values[0].stderr
    assert (found.values[0].low, found.values[0].high) == (max(0.0, 0.5 - half), min(1.0, 0.5 + half))
    assert found.differences[1].high == pytest.approx(-0.5 + half) and found.differences[1].better is None


def test_pairs_that_all_differ_alike_have_an_interval():
    """Ten pairs without a difference: as many may differ, either way, as Wilson's interval of 0 of 10 allows."""
    alike = answers([1.0] * 10)
    found = row(compare([result(alike), result(alike)])).differences[1]
    assert (found.value, found.better) == (0.0, None)
    assert (found.low, found.high) == pytest.approx((-wilson(0.0, 10)[1], wilson(0.0, 10)[1]))
    assert constant_difference(-1.0, 10) == pytest.approx((-1.0, -1 + 2 * wilson(0.0, 10)[1]))
    worse = row(compare([result(alike), result(answers([0.0] * 10))])).differences[1]
    assert worse.better is False and worse.high < 0
    texts = [Sample("ppl", "books", "perplexity", str(i), 10.0) for i in range(5)]  # the same model twice
    both = [EvalResult({}, {}, [Score("ppl", "books", "perplexity", 10.0, 0.0, 5, higher_is_better=False)], texts)] * 2
    assert (compare(both)[0].differences[1].low, compare(both)[0].differences[1].high) == (0, 0)


def test_examples_that_read_another_text_are_not_the_same():
    """Results without hashes are paired by name and right answer."""
    ours = [replace(sample, read_sha256=f"{i}") for i, sample in enumerate(answers([1.0] * 6))]
    theirs = [replace(sample, read_sha256="other") if i < 2 else sample for i, sample in enumerate(ours)]
    found = row(compare([result(ours), result(theirs)])).differences[1]
    assert (found.examples, found.only_baseline, found.only_model) == (4, 2, 2)
    assert row(compare([result(ours), result(answers([0.0] * 6))])).differences[1].examples == 6


def test_what_is_no_number_is_neither_better_nor_worse():
    samples = [Sample("ppl", "books", "perplexity", str(i), 10.0) for i in range(6)]
    broken = [replace(sample, score=math.nan) for sample in samples]
    pair = [
        EvalResult({}, {}, [Score("ppl", "books", "perplexity", value, error, 6, higher_is_better=False)], found)
        for value, error, found in ((10.0, 1.0, samples), (math.nan, math.nan, broken))
    ]
    rows = compare(pair)
    assert (rows[0].values[1].low, rows[0].differences[1].low, rows[0].differences[1].better) == (None, None, None)
    assert difference_rows(["a", "b"], rows)[0][3] == "no number"


def test_perplexities_are_compared_by_their_ratio():
    """Each text of the second model has 1.1 times the first one's, up to 1 %."""
    factors = [1.09, 1.10, 1.11, 1.10, 1.10]
    texts = [Sample("ppl", "books", "perplexity", str(i), 10.0 * (i + 1)) for i in range(5)]
    worse = [replace(sample, score=sample.score * factor) for sample, factor in zip(texts, factors)]
    scores = [Score("ppl", "books", "perplexity", v, 1.0, 5, higher_is_better=False) for v in (20.0, 22.0)]
    pair = [EvalResult({}, {}, [score], samples) for score, samples in zip(scores, (texts, worse))]
    (found,) = compare(pair)
    assert found.differences[1].value == pytest.approx(sum(map(math.log, factors)) / 5)
    assert found.differences[1].better is False and found.differences[1].low > math.log(1.08)
    assert found.values[0].low == pytest.approx(20 / math.exp(t95(4) * 0.05))


def test_intervals_of_values():
    assert estimate(Score("gsm8k", "g", "acc", 1.0, 0.0, 10)).low == pytest.approx(wilson(1.0, 10)[0])
    ruler = estimate(Score("ruler", "mean", "match", 0.9, 0.1, 100))
    assert (ruler.low, ruler.high) == (pytest.approx(0.9 - t95(99) * 0.1), 1.0)
    assert estimate(Score("ruler", "vt", "match", 1.0, 0.0, 100), groups=10).low == pytest.approx(wilson(1.0, 10)[0])
    assert estimate(Score("ruler", "vt", "match", 0.5, None, 1)).low is None
    right = answers([1.0] * 14 + [0.0] * 6)
    assert estimate(scored(right)).low == pytest.approx(wilson(0.7, 20)[0])
    partly = estimate(Score("ruler", "cwe", "match", 0.5, 0.01, 20))  # parts of answers, which vary less than right and wrong
    assert partly.low == pytest.approx(0.5 - t95(19) * 0.01)


def test_a_results_page_has_scores_errors_maps_and_examples(tmp_path):
    folder = tmp_path / "hybrid"
    for overwrite in (False, True):  # the page is part of the folder, which can be replaced
        make_result("hybrid", 0.6).write(folder, overwrite, also=write_report)
    page = (folder / "report.html").read_text()
    result = make_result("hybrid", 0.6)
    score = next(result.select("gsm8k"))
    for text in (
        *(f"{100 * score.value:.1f}\u00a0%", f"{100 * score.stderr:.2f}", "subset", "11.1 % of the teacher"),
        *("0123456789abcdef" * 4, "Recall, passkey", "RULER, per cent", "Perplexity by position"),
        *(f"<td>RULER cwe 4K (match)</td><td>{100 * next(result.select('ruler', 'cwe')).value:.1f}\u00a0%</td>",),
        *("&lt;b&gt;The number&lt;/b&gt;", "no idea"),
    ):
        assert text in page, text
    assert page.count("<svg") == 2 * 3 and loaded(page) == [] and "<script" not in page
    cells = re.findall(r">\s*(\d+)\s*</text>", page[page.index("Recall, passkey") :].split("</svg>")[0])
    assert [int(c) for c in cells[:15]] == [
        round(100 * s.value) for d in (0.0, 0.25, 0.5, 0.75, 1.0) for s in result.scores if s.suite == "recall" and s.depth == d
    ]


def test_a_page_of_one_score_is_a_page(tmp_path):
    EvalResult({"name": None}, {}, [Score("ppl", "books", "perplexity", 20.0, None, 1, higher_is_better=False)]).write(
        tmp_path / "r"
    )
    assert "<td>20.00</td>" in write_report(tmp_path / "r").read_text()


def test_compare_prints_tables_json_and_a_page(tmp_path, capsys):
    folders = write_results(tmp_path, teacher=0.75, hybrid=0.5)
    compare_verb(folders, tmp_path / "new" / "page.html", json=True)
    found = json.loads(capsys.readouterr().out)
    assert [model["kv_percent"] for model in found["models"]] == [100.0, 11.1]
    assert "<td>11.1</td>" in (tmp_path / "new" / "page.html").read_text()
    ruler = next(r for r in found["rows"] if (r["suite"], r["task"], r["length"]) == ("ruler", "mean", 4096))
    assert ruler["differences"][1]["examples"] == 240 and ruler["differences"][0] is None
    compare_verb(folders)
    shown = capsys.readouterr().out
    assert re.search(rf"RULER 4K, % +{100 * ruler['values'][0]['value']:.1f} \[", shown)
    assert re.search(rf"RULER 4K +hybrid +{100 * ruler['differences'][1]['value']:+.1f}", shown)
    assert loaded((tmp_path / "new" / "page.html").read_text()) == []


def test_what_was_measured_otherwise_is_said(tmp_path, capsys):
    for seed in (0, 1):
        make_result("hybrid", 0.5, seed).write(tmp_path / f"seed{seed}")
    compare_verb([tmp_path / "seed0", tmp_path / "seed1"])
    newer = make_result("hybrid", 0.5)
    newer.run["libraries"]["lm-eval"] = "0.5.0"
    newer.write(tmp_path / "newer")
    compare_verb([tmp_path / "seed0", tmp_path / "newer"])
    said = capsys.readouterr()
    assert 'measured differently: lm-eval null (seed0), "0.5.0" (newer)' in said.err
    assert "measured differently: seed 0 (seed0), 1 (seed1)" in said.err and "no example is known to be the same" in said.out


@pytest.mark.parametrize("wrong", ["one", "nowhere", "damaged", "other format", "other file", "output"])
def test_bad_input_is_one_sentence(tmp_path, wrong, capsys):
    good, other = write_results(tmp_path, a=0.5, b=0.5)
    if wrong == "damaged":
        (other / "samples.jsonl").write_text('{"suite": "rul')
    if wrong == "other format":
        (other / "results.json").write_text('{"schema": 99, "model": {}, "run": {}, "scores": []}')
    if wrong == "other file":
        (other / "results.json").write_text('{"teacher_ppl": 20.0}')
    folders = {"one": [good], "nowhere": [good, tmp_path / "nowhere"]}.get(wrong, [good, other])
    said = {
        "one": "at least two",
        "nowhere": "no results folder",
        "other file": "not of .hylo eval",
        "damaged": "cannot be read",
        "other format": "format 99",
    }
    with pytest.raises(ConfigError, match=said.get(wrong, "is a folder")) as raised:
        compare_verb(folders, tmp_path if wrong == "output" else None)
    assert ("cannot be read" in str(raised.value)) == (wrong == "damaged")


def test_compare_starts_without_torch(tmp_path):
    folders = write_results(tmp_path, a=0.5, b=0.5)
    program = (
        "import sys\nfrom megatron_hylo.cli.main import main\n"
        "try: main(['compare', *sys.argv[1:], '--output', 'page.html'])\n"
        "except SystemExit as end: assert not end.code, end\n"
        "assert not {'torch', 'transformers', 'megatron'} & set(sys.modules)"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", program, *folders]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(root), "PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "page.html").is_file(), done.stderr


def test_lengths_as_people_write_them():
    assert [length_name(n) for n in (500, 1000, 1024, 1536, 4096, 131072, 2097152)] == [
        "500", "1,000", "1K", "1.5K", "4K", "128K", "2M",
    ]  # fmt: skip


def test_a_model_without_values_keeps_its_colour():
    """The others' curves have the colours that they have in charts with all of them."""
    axes = Figure().add_subplot()
    draw_buckets(axes, LIGHT, ["1K", "2K"], {"a": {}, "b": {"1K": 1.0, "2K": 2.0}}, y_label="y", x_label="x")
    assert [line.get_color() for line in axes.lines] == [LIGHT.series[1]]
