"""fla's Gated DeltaNet, its decode step and convolution in Triton's interpreter, called as ranks and decoding call them.

Started by test_recurrence_part.py. Prints a line a tensor: "ERROR name relative-error".
"""

import importlib
import itertools

import torch
from fla.ops.common import chunk_delta_h

from megatron_hylo.kernels import causal_conv1d, delta_rule_states, recurrence_part, recurrence_step, tuned
from megatron_hylo.kernels.gated_delta_rule import recurrent_gated_delta_rule
from tests.kernels.compare import worst_error
from tests.kernels.decode_attention_cases import recurrence_errors
from tests.kernels.interpreter import mend_interpreter
from tests.kernels.test_causal_conv1d import document_errors
from tests.kernels.test_gated_delta_rule import inputs
from tests.kernels.test_recurrence_part import delta_rule_errors


def kept_states(*arguments: torch.Tensor, output_final_state: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    return delta_rule_states.KeptStates.apply(*arguments, output_final_state)


if __name__ == "__main__":
    mend_interpreter(chunk_delta_h, recurrence_step.FLA_MODULE)
    torch.set_num_threads(1)
    for module in (delta_rule_states.FLA_CHUNK, delta_rule_states.FLA_NORM, causal_conv1d.FLA_MODULE):
        importlib.import_module(module)
    tuned.install((9, 0))  # with HYLO_AUTOTUNE=never there is nothing to time, which an interpreter could not
    recurrence_part.delta_rule_implementation = lambda k, v, differentiates: "fla"  # there is no GPU
    for name, error in delta_rule_errors(inputs(150, torch.float32, dk=16, dv=32)).items():
        print("ERROR", name, error)
    print(
        "ERROR",
        "kept-states",
        worst_error(kept_states, recurrent_gated_delta_rule, inputs(150, torch.float32, dk=16, dv=32)),
    )
    causal_conv1d._choose = lambda x, k: "torch" if x.dtype == torch.float64 else "fla"  # the oracle is in float64
    for history, sections in itertools.product((False, True), (1, 2)):
        for name, error in document_errors(history, torch.float32, sections=sections).items():
            print("ERROR", f"convolution-{history}-{sections}-{name}", error)
    for name, error in recurrence_errors("cpu", torch.float32).items():
        print("ERROR", name.replace(" ", "-"), error)
