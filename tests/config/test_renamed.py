"""Settings of earlier versions: refused with their new names on the command line and in recipes, translated in run folders."""

import re
from dataclasses import asdict

import pytest
import yaml

from megatron_hylo.cli.main import main
from megatron_hylo.config import ConfigError
from megatron_hylo.config.renamed import RENAMED, refuse_renamed, translate_settings
from megatron_hylo.config.train import TrainConfig


def flat(settings: dict) -> dict:
    """{"optimizer": {"lr": 1}} -> {"optimizer.lr": 1} beside what there was, one level deep."""
    return settings | {f"{k}.{n}": x for k, v in settings.items() if isinstance(v, dict) for n, x in v.items()}


def test_every_new_name_is_a_setting_and_no_old_one_is():
    settings = asdict(TrainConfig(stage="pretrain", data="-", output="-", scratch="-"))
    assert set(RENAMED.values()) <= set(flat(settings))
    assert not RENAMED.keys() & settings.keys()


@pytest.mark.parametrize("spelling", ["--ce_weight=0.5", "--ce_weight 0.5"])
def test_an_old_option_is_refused_with_the_new_one(spelling, capsys):
    with pytest.raises(ConfigError, match="--mla_rope_scaling.factor is now --rope_scaling.factor"):
        refuse_renamed(["train", "--mla_rope_scaling.factor", "4"])
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--stage", "distil", *spelling.split()])
    assert stopped.value.code == 2
    assert "--ce_weight is now --distil.ce_weight" in " ".join("".join(capsys.readouterr()).split())


@pytest.mark.parametrize("spelling", ["--config={}", "--config {}"])
def test_old_keys_of_a_recipe_are_refused_all_at_once(spelling, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"stage": "align", "align_loss": "ild", "optimizer": {"lr": 1}, "wandb": "disabled"}))
    where = re.escape(str(recipe))
    with pytest.raises(ConfigError, match=f"{where} has .*align_loss is now align.loss, wandb is now logging.wandb;"):
        refuse_renamed(["train", *spelling.format(recipe).split()])
    recipe.write_text(yaml.safe_dump({"align": {"loss": "ild", "hidden_weight": 2.0}}))
    refuse_renamed(["train", "--config", str(recipe), "--align.mixer_weight", "3"])
    refuse_renamed(["evaluate", "--tensorboard"])


def test_settings_of_an_earlier_version_are_translated_and_present_ones_left_alone():
    new = asdict(TrainConfig(stage="pretrain", data="-", output="-", scratch="-"))
    assert translate_settings(new) == new
    later = ("distil", "align", "checkpoint", "logging", "profile", "rope_scaling")
    old = {name: value for name, value in new.items() if name not in later}
    old |= {name: f"value of {name}" for name in RENAMED}
    found = flat(translate_settings(old))
    assert {new_name: found[new_name] for new_name in RENAMED.values()} == {v: f"value of {k}" for k, v in RENAMED.items()}


def test_allow_change_names_the_new_key():
    with pytest.raises(ConfigError, match="'ce_weight' is no setting of a run; did you mean distil.ce_weight"):
        TrainConfig(stage="pretrain", data="-", output="-", scratch="-", allow_change="ce_weight")
