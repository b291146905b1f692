"""Triton's interpreter, mended for numpy 2.5 and for loops whose limits are tensors."""

import builtins
import importlib
import types

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def mend_interpreter(*modules: str | types.ModuleType) -> None:
    """Its scalars are arrays of one number, which numpy no longer takes for an index; and loops count in Python's numbers.

    Args:
        modules: of kernels whose loops go over tensors.
    """
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def kernel_range(*limits):
        for i in builtins.range(*map(int, limits)):
            yield tl.core.tensor(interpreter.TensorHandle(np.array([i], dtype=np.int32), tl.int32), tl.int32)

    interpreter._patch_lang_tensor = patch_and_mend
    for module in modules:
        (importlib.import_module(module) if isinstance(module, str) else module).range = kernel_range
