"""Initialisers: one attention layer's weights and statistics to one mixer's weights; pure tensors."""

from megatron_hylo.initialise import calibrated_linear, calibrated_mla, paper, taylor  # noqa: F401  registers their initialisers
from megatron_hylo.initialise.registry import check_complete

check_complete("paper", "calibrated")
