"""The quickstart on the real teacher and text, with as little of everything as still shows each step."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from megatron_hylo.cli.quickstart import _prepare_text, run_quickstart
from megatron_hylo.cli.quickstart_budgets import BUDGETS
from megatron_hylo.cli.quickstart_folders import check_output
from megatron_hylo.config import ConfigError
from tests.data.conftest import make_documents, tokenizer  # noqa: F401  the fixture

SMALL = dict(
    sequence_length=64, calibration_tokens=4096, calibration_length=256, align_tokens=256, distil_tokens=512, eval_windows=2
)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize(("linear", "init"), [("gdn", "calibrated"), ("mamba2", "calibrated"), ("gdn", "paper")])
def test_quickstart(linear, init, tmp_path):
    budget = replace(BUDGETS["cpu", init], **SMALL)
    console = Console(record=True, width=200)

    def run() -> dict:
        return run_quickstart(linear, init, "The kernel", None, tmp_path, None, console, budget)

    summary = run()
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000 and (tmp_path / "export" / "model.safetensors").is_file()
    assert 10 < summary["teacher_ppl"] < 60 and summary["train_tokens"] == 768
    assert summary["paper_init_ppl"] > 5_000 and summary["distilled_kl"] > 0
    if init == "calibrated":
        assert summary["init_ppl"] < 30 * summary["teacher_ppl"] and summary["kv_percent"] < 12
    else:
        assert summary["init_ppl"] == summary["paper_init_ppl"]
    assert "The kernel" in console.export_text(clear=False)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    again = run()  # nothing is made twice
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == before
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in summary.items() if k != "seconds"}
    with pytest.raises(ConfigError, match="is another model than"):
        run_quickstart("mamba2" if linear == "gdn" else "gdn", init, None, None, tmp_path, None, console, budget)


def test_another_text_in_the_same_output_is_refused(tmp_path, tokenizer):  # noqa: F811
    tokenizer.save_pretrained(tmp_path / "teacher" / "tokenizer")
    for name, count in (("text", 20), ("copy", 20), ("other", 21)):
        (tmp_path / name).mkdir()
        for document in make_documents(count):
            (tmp_path / name / document.name).write_text(document.text)
    run = tmp_path / "run"
    run.mkdir()
    for name in ("text", "text", "copy"):
        check_output(run, "gdn", "calibrated", str(tmp_path / name))
        _prepare_text(str(tmp_path / name), None, tmp_path / "teacher", run / "data", run)
    for text in (str(tmp_path / "other"), None):
        with pytest.raises(ConfigError, match="data was made of another text than .*(other|default); give another --output"):
            check_output(run, "gdn", "calibrated", text)


def test_either_default_text_goes_on_and_own_text_is_refused(tmp_path, tokenizer):  # noqa: F811
    tokenizer.save_pretrained(tmp_path / "teacher" / "tokenizer")
    fetched = tmp_path / "manuals-django-6.0.8" / "documents.jsonl"
    fetched.parent.mkdir()
    fetched.write_text("".join(json.dumps({"name": d.name, "text": d.text}) + "\n" for d in make_documents(20)))
    run = tmp_path / "run"
    run.mkdir()
    for given in (("manuals", fetched), None):  # the second time nothing is fetched
        check_output(run, "gdn", "calibrated", None)
        _prepare_text(None, given, tmp_path / "teacher", run / "data", run)
        assert json.loads((run / "results.json").read_text()) == {"text": "manuals"}
    with pytest.raises(ConfigError, match="data was made of another text than .*documents.jsonl; give another --output"):
        check_output(run, "gdn", "calibrated", str(fetched))
