"""vLLM's kernel before Gated DeltaNet's recurrence is compiled for an H100 with the widths that the plugin gives it."""

import importlib.util
import subprocess
import sys

import pytest

pytestmark = pytest.mark.vllm
CODE = """
import importlib.util, sys, types
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

root = importlib.util.find_spec("vllm").submodule_search_locations[0]  # not imported: on a CPU it hides Triton
sys.modules["vllm"] = types.ModuleType("vllm")
sys.modules["vllm.triton_utils"] = types.SimpleNamespace(triton=triton, tl=tl)
file = f"{root}/third_party/flash_linear_attention/ops/fused_gdn_prefill_post_conv.py"
spec = importlib.util.spec_from_file_location("preparation", file)
preparation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(preparation)

def compiles(keys, values):
    sizes = dict(H=9, HV=9, K=256, V=512, APPLY_L2NORM=True, L2NORM_EPS=1e-6, OUTPUT_G_EXP=False, SOFTPLUS_THRESHOLD=20.0,
                 BLOCK_T=16, BK=keys, BV=values)
    names = preparation._fused_post_conv_kernel.arg_names
    half = ("mixed_qkv_ptr", "a_ptr", "b_ptr", "q_ptr", "k_ptr", "v_ptr")
    whole = ("A_log_ptr", "dt_bias_ptr", "g_ptr", "beta_ptr")
    kinds = {n: "constexpr" if n in sizes else "*bf16" if n in half else "*fp32" if n in whole else "i32" for n in names}
    try:
        triton.compile(ASTSource(preparation._fused_post_conv_kernel, kinds, sizes), target=GPUTarget("cuda", 90, 32))
    except triton.CompilationError:
        return False
    return True

print(compiles(256, 512), compiles(512, 512))
"""


def test_one_width_compiles_where_two_do_not():
    """The kernel compiles with one block width alone; once it compiles with two, `gdn.widest` can go."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM: make serve-test")
    pytest.importorskip("triton")
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=600)
    assert run.stdout.strip() == "False True", run.stderr[-2000:]
