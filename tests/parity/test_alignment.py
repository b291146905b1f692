"""Alignment under every parallelism makes the losses, gradients and weights that one rank makes, for each of its losses.

What is compared is in measured.py, how it is measured in conftest.py and worker.py.
"""

import pytest

from tests.parity.measured import assert_caught, assert_equals_one_rank, cases, parametrize, parametrize_faults

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(1800)]  # the first case waits for all

CASES = [
    *cases("normed", "mse ild sequential", "tp2 tp2_sp dp2 cp2_gather pp2 pp2_vp2 tp2_sp_cp2 tp2_sp_dp2"),
    *cases("normed", "mse", "cp2_a2a pp2_cp2 tp2_sp_pp2_cp2"),
    *cases("normed", "sequential", "pp2_cp2"),
    *cases("normed", "packed_mse", "tp2_sp cp2_gather pp2 tp2_sp_cp2"),
    *cases("mixed", "mse", "cp2_gather cp2_dp2 dp2_plain pp2_given pp4 pp2_vp2_tp2_sp"),
    *cases("mixed", "ild", "pp4"),
    *cases("mixed", "sequential", "pp4 pp2_vp2_tp2_sp"),
    *cases("mixed", "mse_pairs", "tp2_sp dp2 cp2_gather"),
    *cases("mixed", "packed_mse_pairs", "tp2_sp cp2_gather"),
    *cases("kda", "mse", "tp2_sp"),
    *cases("experts", "mse ild", "ep2"),
]
# `mixed` is `normed` without q/k-norms and biases, `tied` has one of its mixers, and embeddings are frozen in this stage;
# two windows a pass differ from one where tokens are shared out, which is above
WHOLE = "mse ild sequential mse_pairs"
SLOW = [
    *cases("mixed", WHOLE, "tp2 tp2_sp dp2 dp2_plain cp2_gather pp2 pp2_vp2 pp2_given pp4 pp2_vp2_tp2_sp"),
    *cases("tied", WHOLE, "tp2 tp2_sp dp2 cp2_gather pp2 pp2_vp2"),
    *cases("mixed", "mse", "cp2_a2a"),
    *cases("tied", "mse", "cp2_a2a"),
    *cases("normed", "mse_pairs", "tp2 tp2_sp dp2 cp2_gather pp2 pp2_vp2 tp2_sp_cp2"),
    *cases("normed", "packed_mse packed_mse_pairs", "tp2_sp cp2_gather cp2_a2a pp2 pp2_vp2 tp2_sp_cp2"),
]


@parametrize(CASES, SLOW)
def test_alignment_equals_one_rank(measured, record_property, model, stage, parallelism):
    assert_equals_one_rank(measured, (model, stage, parallelism), record_property)


@parametrize_faults("align", CASES)
def test_a_fault_planted_in_alignment_is_caught(measured, record_property, fault):
    assert_caught(measured, fault, record_property)
