"""vLLM's Gated DeltaNet kernels, compiled for an H100 with launches as vLLM has them and as the plugin changes them."""

import importlib.util
import subprocess
import sys

import pytest

pytestmark = pytest.mark.vllm
LOAD = """
import importlib.util, re, subprocess, sys, tempfile, types
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

root = importlib.util.find_spec("vllm").submodule_search_locations[0]  # not imported: on a CPU it hides Triton
sys.modules["vllm"] = types.ModuleType("vllm")
sys.modules["vllm.triton_utils"] = types.SimpleNamespace(triton=triton, tl=tl)
sys.modules["ops"] = package = types.ModuleType("ops")
package.__path__ = [f"{root}/third_party/flash_linear_attention/ops"]
sys.modules["ops.op"] = types.SimpleNamespace(exp=tl.exp, log=tl.log)

def compiled(kernel, pointers, sizes, warps=4):
    names = kernel.arg_names
    kinds = {n: "constexpr" if n in sizes else pointers.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in pointers}
    source = ASTSource(kernel, kinds, sizes, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
"""
WIDTHS = """
from ops.fused_gdn_prefill_post_conv import _fused_post_conv_kernel as kernel

def compiles(keys, values):
    sizes = dict(H=9, HV=9, K=256, V=512, APPLY_L2NORM=True, L2NORM_EPS=1e-6, OUTPUT_G_EXP=False, SOFTPLUS_THRESHOLD=20.0,
                 BLOCK_T=16, BK=keys, BV=values)
    half = ("mixed_qkv_ptr", "a_ptr", "b_ptr", "q_ptr", "k_ptr", "v_ptr")
    whole = ("A_log_ptr", "dt_bias_ptr", "g_ptr", "beta_ptr")
    try:
        compiled(kernel, dict.fromkeys(half, "*bf16") | dict.fromkeys(whole, "*fp32"), sizes)
    except triton.CompilationError:
        return False
    return True

print(compiles(256, 512), compiles(512, 512))
"""
WARPS = """
from ops.fused_recurrent import fused_recurrent_gated_delta_rule_packed_decode_kernel as kernel

def spills(keys, values, warps):
    heads, other = 4608 // values, 2304 // keys
    sizes = dict(H=other, HV=heads, K=keys, V=values, BK=keys, BV=32, SOFTPLUS_THRESHOLD=20.0, USE_QK_L2NORM_IN_KERNEL=True,
                 stride_mixed_qkv_tok=9216, stride_a_tok=2 * heads, stride_b_tok=2 * heads, stride_indices_seq=1,
                 stride_init_state_token=4608 * keys, stride_final_state_token=4608 * keys)
    pointers = dict.fromkeys(("mixed_qkv", "a", "b", "o"), "*bf16") | dict.fromkeys(("A_log", "dt_bias", "h0", "ht"), "*fp32")
    made = compiled(kernel, pointers | {"ssm_state_indices": "*i32", "scale": "fp32"}, sizes, warps)
    with tempfile.TemporaryDirectory() as folder:
        open(f"{folder}/kernel.ptx", "w").write(made.asm["ptx"])
        ptxas = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", f"{folder}/kernel.ptx", "-o", f"{folder}/kernel"]
        said = subprocess.run(ptxas, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"(\\d+) bytes spill stores", said)[1]) > 0

print(spills(128, 128, 1), spills(256, 512, 1), spills(256, 512, 2))
"""


def said(code: str) -> str:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM: make serve-test")
    pytest.importorskip("triton")
    run = subprocess.run([sys.executable, "-c", LOAD + code], capture_output=True, text=True, timeout=600)
    return run.stdout.strip() or run.stderr[-2000:]


def test_one_width_compiles_where_two_do_not():
    """The kernel compiles with one block width alone; once it compiles with two, `gdn.widest` can go."""
    assert said(WIDTHS) == "False True"


def test_a_wide_state_needs_more_warps_than_one():
    """One warp's registers hold a block of vLLM's own states, not of ours; once they do, `gdn.enough` can go."""
    assert said(WARPS) == "False True False"
    from megatron_hylo.serve.vllm import gdn

    warps = gdn.enough["num_warps"]
    assert [warps({"num_warps": 1, "BK": keys, "BV": 32}) for keys in (64, 128, 256, 512)] == [1, 1, 2, 4]
