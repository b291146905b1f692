"""Benchmarks end as the verbs do: a known error is a sentence."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_every_benchmark_has_known_errors_end_in_a_sentence():
    """All that are given something on the command line have the same last lines."""
    programs = [file for file in FOLDER.glob("*.py") if "auto_cli" in file.read_text() or "argparse" in file.read_text()]
    assert len(programs) >= 20
    ends = {file.name: file.read_text().rstrip().split("\n")[-3:-1] for file in programs}
    wanted = ['if __name__ == "__main__":', '    with plain_errors("benchmark"):']
    assert [name for name, end in ends.items() if end != wanted] == []


def test_a_missing_model_is_one_sentence(monkeypatch, capsys):
    """No traceback, exit code 2, and the path that was given."""
    monkeypatch.setattr("sys.argv", ["evaluation.py", "/nowhere"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(FOLDER / "evaluation.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: /nowhere") and "Traceback" not in said
