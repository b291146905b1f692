"""Suites of an evaluation between the steps of a run, on a tiny student."""

import pytest

from megatron_hylo.config import ConfigError
from megatron_hylo.io import read_json
from megatron_hylo.train.loop import train
from tests.train.runs import metrics, weights

METRIC = "ppl/heldout/perplexity/16"


def test_suites_measure_what_the_run_does_and_the_best_student_is_kept(settings, tmp_path, monkeypatch):
    plain = settings(steps=4, output=tmp_path / "plain", checkpoint=dict(save_interval=2))
    train(plain)
    # rates so high that later steps are worse
    evaluation = dict(every=2, suites=["ppl"], limit=4, keep_best=METRIC)
    run = tmp_path / "run"
    train(settings(steps=4, eval_interval=2, evaluation=evaluation, checkpoint=dict(save_interval=2)))
    assert metrics(run) == metrics(tmp_path / "plain")  # training goes on as without
    measured, expected = metrics(run, f"eval/{METRIC}"), metrics(run, "heldout_perplexity")
    assert measured == pytest.approx(expected, rel=1e-4) and set(measured) == {2, 4}
    best = min(measured, key=measured.__getitem__)
    assert read_json(run / "best.json") == {"metric": METRIC, "step": best, "value": measured[best]}
    kept = weights(run / "best_model")
    saved = weights(run / "checkpoints" / f"step_{best:08d}")
    assert kept and all(bool((kept[name] == saved[name]).all()) for name in kept)
    assert "best ppl/heldout/perplexity/16 so far" in (run / "log.txt").read_text()


@pytest.mark.parametrize(
    "evaluation, message",
    [
        (dict(every=2), "needs both every and suites"),
        (dict(every=2, suites=["ppk"]), "no suite 'ppk'"),
        (dict(every=2, suites=["ppl"], keep_best="recall/mean/exact"), "is not of evaluation.suites"),
        (dict(every=2, suites=["ppl"], limit=0), "limit must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, evaluation, message):
    with pytest.raises(ConfigError, match=message):
        settings(evaluation=evaluation)
