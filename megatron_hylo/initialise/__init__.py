"""Initialisers: from a teacher's attention layer to a mixer of the student, as pure functions of tensors."""

from megatron_hylo.initialise import calibrated_linear, calibrated_mla, paper  # noqa: F401  registers their initialisers
from megatron_hylo.initialise.registry import check_complete

check_complete()
