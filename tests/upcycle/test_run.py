"""`upcycle_folder` with a calibration folder: what it writes is what it reports."""

from dataclasses import asdict, fields

import pytest
import torch

from megatron_hylo.calibrate import shares
from megatron_hylo.calibrate.statistics import CalibrationFolder
from megatron_hylo.config import ConfigError
from megatron_hylo.config.upcycle import UpcycleConfig
from megatron_hylo.convert.folder_source import FolderSource
from megatron_hylo.eval.perplexity import evaluate
from megatron_hylo.initialise.calibrated_mla import choose_rotary_pairs
from megatron_hylo.io.identity import content_identity
from megatron_hylo.models.checkpoint import load_model
from megatron_hylo.models.description import read_description
from megatron_hylo.upcycle.assemble import attention_tensors
from megatron_hylo.upcycle.run import upcycle_folder
from megatron_hylo.upcycle.solved import SolvedLayers

SIZES = dict(
    kv_lora_rank=20, q_lora_rank=48, qk_pos_emb_head_dim=12, linear_num_heads=6, linear_key_head_dim=16,
    linear_value_head_dim=16, mamba_num_heads=6,
)  # fmt: skip


@pytest.fixture
def upcycle(material, tmp_path):
    """(pattern, other arguments) -> report, folder."""

    def run(pattern: str = "+GM", **arguments):
        fields = dict(shapes="teacher", overrides=SIZES, calibration=material.done, sequential=True) | arguments
        settings = UpcycleConfig(material.teacher, tmp_path / "out", pattern=pattern, overwrite=True, **fields)
        return upcycle_folder(settings), tmp_path / "out"

    return run


def mlps(model) -> list[torch.Tensor]:
    return [mlp.mlp.linear_fc2.weight for _, mlp in model.mixer_layers()]


def test_the_folder_is_as_good_as_reported(upcycle, material):
    report, folder = upcycle()
    model, teacher = load_model(folder), load_model(material.teacher)
    _, heldout = CalibrationFolder(material.done, material.teacher).windows()
    assert evaluate(model, heldout, teacher).to_dict() == pytest.approx(report.quality.to_dict(), rel=1e-5)
    assert report.teacher_quality.kl == pytest.approx(0, abs=1e-6)
    assert [(e.layer, e.symbol) for e in report.errors] == list(enumerate("+GM"))
    provenance = read_description(folder)[1]["provenance"]
    assert (provenance["init"], provenance["sequential"], provenance["calibration_tokens"]) == ("calibrated", True, 960)
    settings = UpcycleConfig(**{field.name: provenance[field.name] for field in fields(UpcycleConfig)})
    assert asdict(settings).items() <= provenance.items() and settings.overrides == SIZES  # it can be made again from these
    assert model.config.hylo.mla_rotary_pairs[0] and not model.config.hylo.mla_rotary_pairs[1]


def test_rotary_pairs_are_chosen_for_distances_up_to_the_calibrations_length(upcycle, material):
    """Windows of 40 tokens: slow pairs, which turn in thousands of tokens alone, are not worth a slot."""
    config = load_model(upcycle("+GM")[1]).config.hylo
    source, statistics = FolderSource(material.teacher), CalibrationFolder(material.done, material.teacher)
    attention = attention_tensors(source.read, source.config, 0)
    of_40, of_4000 = (
        choose_rotary_pairs(attention, config, source.config, statistics[0], "energy", span) for span in (40, 4000)
    )
    assert tuple(config.mla_rotary_pairs[0]) == of_40 != of_4000


@pytest.mark.parametrize("settings", [dict(sequential=False), dict(mlps=False)], ids=["one-shot", "mixers alone"])
def test_mlps_stay_the_teachers_where_asked(upcycle, material, settings):
    _, folder = upcycle(**settings)
    ours, theirs = mlps(load_model(folder)), mlps(load_model(material.teacher))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("pattern", ["+GM", "GGG"])
def test_it_is_better_than_the_papers_start(upcycle, pattern):
    paper, _ = upcycle(pattern, init="paper", shapes="paper", overrides=None)
    calibrated, _ = upcycle(pattern)
    assert calibrated.quality.kl < paper.quality.kl and paper.errors is None


def test_taylor_starts_with_quiet_linear_layers_and_calibrated_mla(upcycle, material):
    report, folder = upcycle("+GG", init="taylor", sequential=False)
    config = load_model(folder).config.hylo
    assert config.mla_rotary_pairs[0] and report.errors is None and report.quality.kl > 0, "nothing is solved in it"
    with pytest.raises(ConfigError, match="init `taylor` needs --calibration"):
        upcycle("+GG", init="taylor", calibration=None)


def test_what_cannot_be_calibrated_is_refused(upcycle, material, tmp_path):
    with pytest.raises(ConfigError, match="needs --calibration"):
        upcycle(calibration=None)
    with pytest.raises(ConfigError, match="another checkpoint"):
        upcycle_folder(UpcycleConfig(material.other, tmp_path / "out", pattern="+GM", calibration=material.done))
    assert not (tmp_path / "out").exists()


def test_more_ranks_than_groups_of_text_are_refused(upcycle, monkeypatch, tmp_path):
    monkeypatch.setattr(shares, "world_size", lambda: 9)
    with pytest.raises(ConfigError, match="9 ranks were started, .* solved by at most 8; start 8 or fewer"):
        upcycle()
    assert not list(tmp_path.iterdir())


def test_a_killed_upcycling_goes_on_at_its_layer(upcycle, monkeypatch, tmp_path):
    """Layers that were solved are not solved again, and the model is the same."""
    report, folder = upcycle()
    wanted, keep, solved = content_identity(folder), SolvedLayers.keep, []

    def counted(self, error, mixer, mlp):
        keep(self, error, mixer, mlp)
        solved.append(error.layer)
        if solved == [0, 1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(SolvedLayers, "keep", counted)
    with pytest.raises(KeyboardInterrupt):
        upcycle()
    again, folder = upcycle()
    assert solved == [0, 1, 2] and content_identity(folder) == wanted
    assert again.to_dict() == report.to_dict() and not (tmp_path / ".out.layers").exists()


def test_layers_of_other_settings_are_not_taken_over(upcycle, monkeypatch):
    """One-shot after a sequential start that was killed is what one-shot makes alone."""
    wanted = content_identity(upcycle(sequential=False)[1])

    def killed(self, error, mixer, mlp):
        keep(self, error, mixer, mlp)
        if error.layer == 1:
            raise KeyboardInterrupt

    keep = SolvedLayers.keep
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SolvedLayers, "keep", killed)
        upcycle()
    assert content_identity(upcycle(sequential=False)[1]) == wanted


def test_the_seed_decides_what_is_random(upcycle):
    made = [content_identity(upcycle("GGG", init="paper", shapes="paper", overrides=None, seed=s)[1]) for s in (0, 1, 0)]
    assert made[0] == made[2] != made[1]
