"""Results folders."""

import pytest

from megatron_hylo.config import ConfigError
from megatron_hylo.eval.results import EvalResult, Sample, Score, mean, read_results

SCORES = [
    Score("recall", "passkey", "exact", 0.5, 0.3, 4, length=1024),
    Score("recall", "passkey", "exact", 1.0, 0.4, 4, length=2048),
]


def test_a_results_folder_reads_back_as_written(tmp_path):
    """Scores and samples of a folder are those that were written."""
    sample = Sample("recall", "passkey", "exact", "1024/0", 1.0, length=1024, prompt_end="the key is", expected="7", output="7")
    written = EvalResult({"name": "m"}, {"seed": 0}, SCORES, [sample])
    written.write(tmp_path / "r")
    assert read_results(tmp_path / "r") == written


def test_what_is_no_results_folder_is_refused(tmp_path):
    """The sentence names the folder and the command that makes one."""
    with pytest.raises(ConfigError, match="hylo eval"):
        read_results(tmp_path)


def test_mean_of_scores():
    """Means of values; errors of independent scores add in squares."""
    found = mean(SCORES)
    assert (found.value, found.examples, found.length) == (0.75, 8, None)
    assert found.stderr == pytest.approx(0.25)
