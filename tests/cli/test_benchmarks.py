"""Benchmarks end as the verbs do: a known error is a sentence."""

import copy
import runpy
from pathlib import Path

import pytest
import torch

from megatron_hylo.hf.attention_hylo import HyloLatentAttention
from tests.conftest import tiny_hf_model
from tests.hf.conftest import random_model, serve_config

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


def test_decode_on_the_cpu_is_timed_with_absorbed_and_with_expanded_keys(monkeypatch):
    """The same hybrid twice and a dense model; the attention is as it was afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    program = runpy.run_path(str(FOLDER / "cpu_decode.py"))
    absorbs, chosen = HyloLatentAttention.absorbs, []
    monkeypatch.setattr(HyloLatentAttention, "absorbs", lambda *given: chosen.append(absorbs(*given)) or chosen[-1])
    ids = torch.randint(160, (1, 75))
    models = {"hybrid": random_model(serve_config("G+"), torch.float32), "dense": tiny_hf_model("llama")}
    hybrid, anew, dense = program["decode_rates"](models, ids, 2)
    assert (hybrid["model"], anew["model"], dense["model"]) == ("hybrid", "hybrid, made anew", "dense")
    assert chosen.count(True) == 4  # steps, two of them untimed
    assert hybrid["cache_bytes"] < dense["cache_bytes"]


def test_drafts_of_every_kind_leave_the_text_as_it_is(monkeypatch):
    """Counts of proposed and kept tokens agree; a model that drafts for itself is kept."""
    monkeypatch.syspath_prepend(str(FOLDER))
    program = runpy.run_path(str(FOLDER / "cpu_decode.py"))
    prompts = program["beginnings"]([torch.randint(160, (n,)) for n in (5, 40, 50)], 2, 10, 30)
    assert [list(prompt.shape) for prompt in prompts] == [[1, 10], [1, 30]]
    hybrid, dense = random_model(serve_config("G+"), torch.float32), tiny_hf_model("llama")
    for model, draft in (
        (dense, {"assistant_model": hybrid}), (hybrid, {"assistant_model": dense}),
        (hybrid, {"assistant_early_exit": 1}), (hybrid, {"prompt_lookup_num_tokens": 2}),
    ):  # fmt: skip
        found = program["acceptance"](model, draft, prompts, 6, 2)
        assert found["equal"] == 2 and 0 <= found["accepted"] <= found["proposed"] and found["speed"] > 0
    found = program["acceptance"](hybrid, {"assistant_model": copy.deepcopy(hybrid)}, prompts, 6, 2)
    # of 6 tokens the last is never proposed, and each pass adds one of its own: 2 + 1, 2 + 1
    assert (found["proposed"], found["accepted"], found["tokens_a_pass"]) == (8, 8, 3)
    with pytest.raises(SystemExit, match="longer than 45"):
        program["beginnings"]([torch.zeros(50)], 2, 10, 45)
