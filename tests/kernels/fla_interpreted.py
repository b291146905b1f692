"""fla's Gated DeltaNet and convolution in Triton's interpreter, called as context-parallel ranks call them.

Started by test_recurrence_part.py. Prints a line a tensor: "ERROR name relative-error".
"""

import builtins
import importlib
import itertools

import numpy as np
import torch
import triton.language as tl
from fla.ops.common import chunk_delta_h
from triton.runtime import interpreter

from megatron_hylo.kernels import causal_conv1d, delta_rule_states, recurrence_part, tuned
from megatron_hylo.kernels.gated_delta_rule import recurrent_gated_delta_rule
from tests.kernels.compare import worst_error
from tests.kernels.test_causal_conv1d import document_errors
from tests.kernels.test_gated_delta_rule import inputs
from tests.kernels.test_recurrence_part import delta_rule_errors


def mend_interpreter() -> None:
    """Its scalars are arrays of one number, which numpy no longer takes for an index; and loops count in Python's numbers."""
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def kernel_range(*limits):
        for i in builtins.range(*map(int, limits)):
            yield tl.core.tensor(interpreter.TensorHandle(np.array([i], dtype=np.int32), tl.int32), tl.int32)

    interpreter._patch_lang_tensor = patch_and_mend
    chunk_delta_h.range = kernel_range


def kept_states(*arguments: torch.Tensor, output_final_state: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    return delta_rule_states.KeptStates.apply(*arguments, output_final_state)


if __name__ == "__main__":
    mend_interpreter()
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
