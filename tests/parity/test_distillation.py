"""Distillation under every parallelism makes the losses, gradients and weights that one rank makes, for every teacher signal.

What is compared is in measured.py, how it is measured in conftest.py and worker.py.
"""

import pytest
import torch

from tests.parity.measured import assert_caught, assert_equals_one_rank, cases, oracle_of, parametrize, parametrize_faults

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(1800)]  # the first case waits for all

CASES = [
    *cases("normed", "distil", "tp2 tp2_sp dp2 cp2_gather cp2_a2a pp2 pp2_vp2"),
    *cases("normed", "distil", "pp2_cp2 tp2_sp_cp2 tp2_sp_dp2"),
    *cases("normed", "packed_distil", "tp2_sp cp2_gather pp2 pp2_vp2 pp2_cp2 tp2_sp_cp2 tp2_sp_pp2_cp2"),
    *cases("normed", "stored packed_stored reverse", "tp2_sp_cp2"),
    *cases("mixed", "distil", "dp2_plain cp2_dp2 pp2_given pp4 pp2_vp2_tp2_sp"),
    *cases("mixed", "packed_distil", "dp2"),
    *cases("mixed", "reverse", "tp2 cp2_gather"),
    *cases("mixed", "stored", "tp2 dp2 cp2_gather pp2"),
    *cases("mixed", "packed_stored", "tp2_sp dp2 cp2_gather"),
    *cases("mixed", "windows", "tp2_sp dp2 cp2_gather cp3 pp2_vp2 pp2_cp2"),
    *cases("mixed", "packed_windows", "cp2_gather pp2_vp2 tp2_sp_cp2"),
    *cases("mixed", "top_k", "tp2"),
    *cases("mixed", "recall answers packed_answers_recall_stored", "cp2_gather"),
    *cases("tied", "distil", "tp2 tp2_sp pp2 pp4"),
    *cases("kda", "distil", "tp2_sp"),
    *cases("experts", "distil", "ep2 tp2_sp_ep2"),
    *cases("odd", "distil", "tp4"),
    *cases("odd", "top_k stored", "tp2"),
    *cases("odd", "packed_distil reverse", "tp2_sp"),
]
# `mixed` is `normed` without q/k-norms and biases; what the head loss and the teacher read does not depend on how mixers
# exchange their parts (cp2_a2a), and is divided in these as in the parallelisms above; one case for eight ranks
SLOW = [
    *cases("mixed", "distil", "tp2 tp2_sp dp2 cp2_gather cp2_a2a pp2 pp2_vp2"),
    *cases("tied", "distil", "dp2 cp2_gather cp2_a2a pp2_vp2"),
    *cases("mixed", "stored packed_stored reverse", "tp2 tp2_sp dp2 cp2_gather cp2_a2a pp2"),
    *cases("mixed", "windows packed_windows", "tp2_sp cp2_gather pp2_vp2 pp2_cp2 tp2_sp_cp2"),
    *cases("mixed", "windows", "cp2_a2a tp2_sp_pp2_cp2"),
    *cases("normed", "packed_distil", "cp2_a2a"),
    *cases("normed", "distil", "tp2_sp_pp2_cp2"),
    *cases("odd", "top_k stored", "tp4"),
]


@parametrize(CASES, SLOW)
def test_distillation_equals_one_rank(measured, record_property, model, stage, parallelism):
    assert_equals_one_rank(measured, (model, stage, parallelism), record_property)


@parametrize_faults("distil", CASES)
def test_a_fault_planted_in_distillation_is_caught(measured, record_property, fault):
    assert_caught(measured, fault, record_property)


@pytest.mark.parametrize(("model", "stage", "parallelism"), [("mixed", "top_k", "tp2")])
def test_the_top_k_reaches_the_loss(measured, model, stage, parallelism):
    """Classes that are merged lose some of the KL between them."""
    kls = [torch.load(oracle_of(measured, (model, name, parallelism)))["steps"][0]["kl"] for name in (stage, "distil")]
    assert 0 < kls[0] < 0.9 * kls[1]
