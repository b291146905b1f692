"""`hylo report` and the quickstart's page: what is in the files is on the page, which needs nothing else."""

import json
import os
import re
import socket
from pathlib import Path

import matplotlib
import pytest
import torch

from megatron_hylo.cli.quickstart_folders import default_output
from megatron_hylo.cli.quickstart_report import heldout_points, plot_quickstart, write_report
from megatron_hylo.config import ConfigError
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.eval.run_report import write_run_report
from megatron_hylo.eval.runs import differing, read_run
from megatron_hylo.train.run_record import record_start

SUMMARY = dict(
    teacher_ppl=20.0, init_ppl=60.0, aligned_ppl=55.0, distilled_ppl=40.0, paper_init_ppl=37138.0, init_kl=1.0, aligned_kl=0.9,
    distilled_kl=0.8, paper_init_kl=7.6, kv_percent=11.0, kv_bytes_per_token=2560, teacher_kv_bytes_per_token=23040,
    paper_kv_bytes_per_token=2048, train_tokens=1024, heldout_tokens=512, seconds=60.0, device="cpu", init="calibrated",
    layout="made", teacher="SmolLM2", text="documents", generated="</p> is <b>bold</b>",
)  # fmt: skip


def make_run(folder: Path, stage: str, lr: float, heldout: dict[int, float]) -> Path:
    """Write what a run of four steps of 128 tokens leaves, its last line cut off."""
    folder.mkdir(parents=True)
    config = {"stage": stage, "output": str(folder), "global_batch_size": 2, "sequence_length": 64, "train_tokens": 512}
    (folder / "config.json").write_text(json.dumps(config | {"optimizer": {"lr": lr}}))
    lines = [{"step": s, "loss": 1 / s, "tokens": 128 * s, "tokens_per_second": 10.0 * s} for s in range(1, 5)]
    for step, value in heldout.items():
        suites = {"eval/ruler/vt/match/4096": 0.5, "eval/ruler/mean/match/4096": 0.01 * value} if stage == "distil" else {}
        lines.append({"step": step, "heldout_perplexity": value, "heldout_kl": None} | suites)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 5, "lo')
    return folder


@pytest.fixture
def runs(tmp_path) -> Path:
    make_run(tmp_path / "align", "align", 1e-3, {4: 55.0})
    make_run(tmp_path / "distil", "distil", 2e-3, {2: 48.0, 4: 40.0})
    return tmp_path


def loaded(page: str) -> list[str]:
    """Addresses that a browser would fetch."""
    return [a for a in re.findall(r'(?:src|href)="([^"]+)"', page) if not a.startswith("#")]


def test_a_report_has_curves_quality_and_the_settings_that_differ(one_rank, runs):
    record_start(
        TrainConfig(stage="align", data="d", output="o", model="m", teacher="t"), runs / "align", torch.device("cpu"), 0
    )
    os.utime(runs / "distil" / "config.json")  # the later of the two, however busy the machine is
    before = dict(matplotlib.rcParams)
    page = write_run_report([runs]).read_text()
    assert dict(matplotlib.rcParams) == before
    assert differing([read_run(runs / name, name) for name in ("align", "distil")]) == ["stage", "optimizer.lr"]
    for text in (
        "4 of 4",
        socket.gethostname(),
        f"<td>libraries.torch</td><td>{torch.__version__.split('+')[0]}",
        "<td>optimizer.lr</td><td>0.001</td><td>0.002</td>",
        "distil: 48 to 40",
        "Ruler mean (match) at 4,096 tokens by training tokens. distil: 0.48 to 0.4",
    ):
        assert text in page
    # for two widths each: held-out perplexity, loss of each stage, tokens/s, RULER; no chart of what is nowhere
    assert page.count("<svg") == 2 * 5
    assert loaded(page) == [] and "<script" not in page
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    clips = [i for i in identifiers if re.fullmatch(r"p[0-9a-f]{10}", i)]
    assert clips and len(clips) == len(set(clips))  # a chart does not take another's clip path


def test_training_by_position_is_drawn_as_means_of_many_steps(tmp_path):
    """One run is drawn at its first and newest logged steps, a bucket from the records that have it; several at the newest."""
    run = make_run(tmp_path / "run", "distil", 1e-3, {})
    names = [f"by_position/cross_entropy_{bucket}" for bucket in ("0-1K", "1K-2K", "2K-4K")]
    lines = [{"step": 5 * n, names[0]: 3.0 + n, names[1]: 5.0 - n / 50} for n in range(1, 101)]
    lines[-1][names[2]] = 2.0
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    newest = "steps 405-500: 0-1K 93.5, 1K-2K 3.19, 2K-4K 2"
    page = write_run_report([run]).read_text()
    assert (
        f"cross-entropy in training by position, nats a token. run, steps 5-100: 0-1K 13.5, 1K-2K 4.79; run, {newest}" in page
    )
    other = make_run(tmp_path / "other", "distil", 1e-3, {})
    (other / "metrics.jsonl").write_text(json.dumps(lines[0]))
    page = write_run_report([run, other]).read_text()
    assert f"nats a token. run, {newest}; other, step 5: 0-1K 4, 1K-2K 4.98" in page


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not the output of a training run"):
        write_run_report([tmp_path])


def test_the_quickstarts_page_has_text_table_plot_and_commands(runs):
    assert heldout_points(SUMMARY, runs) == ([(0, 60.0), (512, 55.0), (768, 48.0), (1024, 40.0)], 512)
    assert plot_quickstart(SUMMARY, runs).stat().st_size > 10_000
    page = write_report(SUMMARY, "A & B", runs, ".venv/bin/hylo").read_text()
    for text in ("A &amp; B", "&lt;/p&gt; is &lt;b&gt;bold", "11.0\u00a0%", "<td>after stage 2</td><td>40.00</td>"):
        assert text in page
    assert f".venv/bin/hylo report {runs}/align {runs}/distil" in page and page.count("<svg") == 2 and loaded(page) == []
    assert "manuals" not in page and "manuals from PyPI" in write_report(SUMMARY | {"text": "manuals"}, "", runs).read_text()


def test_each_kind_of_quickstart_has_a_folder_of_its_own():
    kinds = [(linear, init) for linear in ("gdn", "mamba2") for init in ("calibrated", "paper")]
    assert str(default_output("gdn", "calibrated")) == "runs/quickstart"
    assert len({default_output(*kind) for kind in kinds}) == 4
