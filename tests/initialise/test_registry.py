"""Looking initialisers up by name."""

import pytest

from megatron_hylo.config import ConfigError
from megatron_hylo.initialise import paper, registry
from megatron_hylo.initialise.registry import get_initialiser, initialiser_names, register_initialiser


def test_paper_makes_all_three_mixers():
    assert "paper" in initialiser_names()
    assert get_initialiser("paper", "+") is paper.mla_from_attention
    assert get_initialiser("paper", "M") is paper.mamba2_from_attention
    assert get_initialiser("paper", "G") is paper.gated_delta_net_from_attention


def test_unknown_name_lists_known_ones():
    with pytest.raises(ConfigError, match="unknown initialiser 'magic'; known: .*paper"):
        get_initialiser("magic", "+")


def test_mixer_the_initialiser_does_not_make_is_named():
    with pytest.raises(ConfigError, match=r"'paper' does not make mixer '\*'; it makes \+ M G"):
        get_initialiser("paper", "*")


def test_taken_name_is_refused():
    get_initialiser("paper", "+")
    with pytest.raises(ConfigError, match="already registered"):
        register_initialiser("paper", "+")(paper.mla_from_attention)


def test_a_family_that_misses_a_mixer_is_refused(monkeypatch):
    """The check that runs when the package is imported."""
    registry.check_complete("paper", "calibrated")
    monkeypatch.delitem(registry._INITIALISERS, ("calibrated", "K"))
    with pytest.raises(RuntimeError, match="initialise: 'calibrated' has no entry for mixer 'K'"):
        registry.check_complete("paper", "calibrated")
