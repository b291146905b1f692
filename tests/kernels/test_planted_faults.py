"""The list of planted faults fits the code as it is, and what is made of pytest's results; runs need a GPU."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.kernels import fault_runs
from tests.kernels.fault_runs import Outcome, judge
from tests.kernels.planted_faults import DECODE, DECODING, FAR_ROWS, FAULTS, ILLEGAL, ROOT, SECTIONS, Fault, Selection


def is_selected(item: pytest.Item, expression: str) -> bool:
    """Whether `-k` takes the test: its words are parts of the name."""
    words = re.sub(r"[^\s()]+", lambda m: m[0] if m[0] in ("and", "or") else str(m[0] in item.name), expression)
    return eval(words)


def test_every_fault_can_be_planted(tmp_path) -> None:
    for name, fault in FAULTS.items():
        file = tmp_path / fault.file
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / fault.file, file)
        fault.plant(tmp_path)
        assert file.read_text() != (ROOT / fault.file).read_text(), name


def test_every_fault_s_tests_are_there(request) -> None:
    """They are collected by pytest's own classes, with all parameters, and need a GPU."""
    selections = dict.fromkeys(fault.tests for fault in FAULTS.values())
    files = {tests.file: pytest.Module.from_parent(request.session, path=ROOT / tests.file).collect() for tests in selections}
    for tests in selections:
        chosen = [item for item in files[tests.file] if isinstance(item, pytest.Item) and is_selected(item, tests.expression)]
        assert chosen, tests
        for item in chosen:
            assert item.get_closest_marker("gpu") and not item.get_closest_marker("slow"), item.name


def test_every_fault_is_listed_in_the_document() -> None:
    _, _, section = (ROOT / "docs" / "testing.md").read_text().partition("## Planted faults of GPU kernels\n")
    rows = re.findall(r"^\| (.+?) \| `(.+?)`: `(.+?)` \|", section, re.M)
    assert [name for name, *_ in rows] == list(FAULTS)
    for name, file, test in rows:
        tests = FAULTS[name].tests
        assert tests.file == f"tests/kernels/{file}" and test in tests.expression, name


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("no such text", "", "0 times"),
        ("import", "", r"[\d]+ times"),
        ("far = row.to(tl.int64)", "far = (row", "is not Python"),
    ],
)
def test_a_fault_that_does_not_fit_the_code_is_refused(tmp_path, old: str, new: str, said: str) -> None:
    shutil.copytree(ROOT / Path(DECODE).parent, tmp_path / Path(DECODE).parent, ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.raises(ValueError, match=rf"triton_decode_attention.py .*{said}"):
        Fault(DECODE, old, new, DECODING).plant(tmp_path)


PLAIN, WILD = Fault("f", "a", "b", DECODING), Fault("f", "a", "b", FAR_ROWS, ILLEGAL)
ASSERTED = (
    "E       AssertionError: ('latent', 0.8)\nE       assert 0.8 < 1e-5\nFAILED tests/a.py::test_b - assert\n1 failed in 2s"
)
CRASHED = f"E   RuntimeError: Triton Error [CUDA]: {ILLEGAL}\nFAILED tests/a.py::test_b - RuntimeError\n1 failed in 2s"


@pytest.mark.parametrize(
    ("code", "output", "fault", "result"),
    [
        (0, "3 passed, 2 deselected in 9s", None, "passed"),
        (0, "3 passed in 9s", PLAIN, "NOT CAUGHT"),
        (0, "3 skipped in 9s", None, "skipped"),
        (1, ASSERTED, None, "failed"),
        (1, ASSERTED, PLAIN, "caught"),
        (1, ASSERTED, WILD, "caught"),
        (1, CRASHED, PLAIN, "failed by another error"),
        (1, CRASHED, WILD, "caught"),
        (1, "ERROR tests/a.py::test_b\n1 error in 2s", PLAIN, "pytest ended with 1"),
        (5, "3 deselected in 1s", PLAIN, "pytest ended with 5"),
        (None, "", PLAIN, "stopped after too long"),
    ],
)
def test_results_are_judged(code, output, fault, result) -> None:
    assert judge(code, output, fault)[0] == result


def test_the_failed_test_and_its_error_are_kept() -> None:
    assert judge(1, ASSERTED, PLAIN) == ("caught", "tests/a.py::test_b", "AssertionError: ('latent', 0.8)")


@pytest.mark.parametrize("missed", ["", "a row's offset", "control"])
def test_faults_are_planted_where_the_control_passes(tmp_path, monkeypatch, capsys, missed: str) -> None:
    """The exit status is 0 where all faults are caught; the results are kept."""
    calls = []

    def run(name: str, tests: Selection, fault: Fault | None, *_: object) -> Outcome:
        calls.append(name)
        good = not missed or missed not in name
        return Outcome(name, tests, fault, ("caught" if fault else "passed") if good else ("NOT CAUGHT" if fault else "failed"))

    monkeypatch.setattr(fault_runs, "run_tests", run)
    with pytest.raises(SystemExit) as stopped:
        fault_runs.main(only="int32|sections", output=tmp_path / "out")
    assert bool(stopped.value.code) == bool(missed)
    assert len(calls) == (2 if missed == "control" else 5) and {name.split(":")[0] for name in calls[:2]} == {"control"}
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert sorted(entry["name"] for entry in kept) == sorted(calls)
    wanted = {
        "": "fault caught: 3",
        "control": "fault without a control that passed: 3",
        "a row's offset": "fault NOT CAUGHT: 1",
    }
    assert wanted[missed] in capsys.readouterr().out


def test_a_check_runs_nothing(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(fault_runs, "run_tests", None)
    fault_runs.main(check=True, output=tmp_path / "out")
    said = capsys.readouterr().out
    assert f"{SECTIONS.file} -k '{SECTIONS.expression}'" in said and all(name in said for name in FAULTS)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="no fault's name has 'nonsense'"):
        fault_runs.main(only="nonsense")
