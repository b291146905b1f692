"""Greedy tokens of vLLM equal transformers', for every mixer and variant, however requests are batched, cut and cached."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.serve.vllm.engine import compare_with_fp32, complete, engine, preemptions, tokens
from tests.serve.vllm.models import MODELS, greedy_tokens, make_model

pytest.importorskip("vllm", reason="needs vLLM: make serve-test")
from megatron_hylo.serve.vllm import backends
from megatron_hylo.serve.vllm.versions import CACHES_UNLIKE_STATES

pytestmark = pytest.mark.vllm
NEW = 16


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return random_tokens(3, 17, 40, 65, 130)


@pytest.fixture(scope="module")
def model(tmp_path_factory, prompts):
    """Makes a model once: its folder and transformers' tokens."""
    made = {}

    def make(name):
        if name not in made:
            folder = make_model(name, tmp_path_factory.mktemp(name))
            made[name] = folder, right_tokens(folder, prompts)
        return made[name]

    return make


@pytest.mark.parametrize("name", MODELS)
def test_tokens_equal_transformers(name, model, prompts):
    """Batched with mixed lengths, then one by one, the longest of which finds its prefix cached.

    vLLM's `*` in fp32 on a GPU is Triton's attention, whose products take 10 bits of each factor (TF32). That may turn a token
    that is nearly as probable as another, so there its log-probabilities are compared, within bounds that the same rounding on
    a CPU keeps (mean .0016, largest .006 of these models) and a scale of scores that is 2 % off does not (.009, .03).
    """
    folder, expected = model(name)
    with engine(folder, enable_prefix_caching=True) as llm:
        batched = complete(llm, prompts, NEW, logprobs=0)
        alone = [complete(llm, [prompt], NEW, logprobs=0)[0] for prompt in prompts]
        for outputs in (batched, alone):
            if torch.cuda.is_available() and "*" in MODELS[name]["hybrid_layer_pattern"]:
                served, right, behind = compare_with_fp32(folder, prompts, outputs)
                errors = (served - right).abs()
                assert errors.mean() < 4e-3 and errors.max() < 1.5e-2 and behind.max() < 1.5e-2
            else:
                assert tokens(outputs) == expected
        cache = llm.llm_engine.vllm_config.cache_config
        assert cache.enable_prefix_caching == caches_prefixes(name)
        if caches_prefixes(name) and cache.block_size < len(prompts[-1]):
            assert alone[-1].num_cached_tokens >= 64


def caches_prefixes(name: str) -> bool:
    """Whether the version caches prefixes of this model: before vLLM 0.30 where all states are alike, and there are some."""
    kinds = set(MODELS[name]["hybrid_layer_pattern"]) & set("GKM")
    return CACHES_UNLIKE_STATES or bool(kinds) and not ("M" in kinds and len(kinds) > 1)


@pytest.mark.parametrize("name", ["mla_gdn", "mla_mamba2", "mla_kda", "aligned_bias_gdn"])
def test_prompts_cut_into_pieces_and_requests_that_wait(name, model, prompts, monkeypatch):
    """With as few keys at a time that the later pieces of two prompts are attended to one by one."""
    folder, expected = model(name)
    monkeypatch.setattr(backends, "CACHED_TOKENS", 60)
    with engine(folder, max_num_batched_tokens=32, max_num_seqs=2, enable_prefix_caching=False) as llm:
        assert tokens(complete(llm, prompts, NEW)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotations_of_latent_attention_equal_apply_rope(dtype):
    """Keys, and queries by heads, are rotated behind an odd number of channels too."""
    from megatron_hylo.kernels.rope import apply_rope, rope_cos_sin, rope_frequencies
    from megatron_hylo.serve.vllm.latent import HyloLatentAttention

    cos, sin = rope_cos_sin(torch.tensor([0, 7, 900, 3, 65_000]), rope_frequencies(6, 10_000.0))
    for shape in ((5, 13), (5, 3, 13)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected = torch.cat([x[..., :7], apply_rope(x[None, ..., 7:], cos, sin, interleaved=True)[0]], dim=-1)
        rotated = HyloLatentAttention.rotate(SimpleNamespace(rotary=6), x.clone(), torch.complex(cos, sin))
        torch.testing.assert_close(rotated, expected)


def test_a_captured_decode_step_reads_the_tensors_that_vllm_updates():
    """A CUDA graph keeps the addresses of its capture: metadata made anew each step may hold no tensors of its own."""
    from megatron_hylo.serve.vllm.backends import LatentBuilder

    tensors = {
        "slot_mapping": torch.tensor([5, -1]),
        "block_table_tensor": torch.tensor([[1, 2], [0, 0]], dtype=torch.int32),
        "seq_lens": torch.tensor([20, 0], dtype=torch.int32),
    }
    starts = torch.tensor([0, 1, 2], dtype=torch.int32)
    m = SimpleNamespace(
        num_reqs=2, num_actual_tokens=2, max_query_len=1, query_start_loc_cpu=starts, is_prefilling=None,
        seq_lens_cpu_upper_bound=torch.tensor([20, 0]), **tensors,
    )  # fmt: skip
    made = LatentBuilder(None, ["layer"], None, torch.device("cpu")).build(0, m)
    assert made.decodes == 2 and not made.prefills
    read = (made.slots, made.block_table, made.lengths)
    assert [tensor.data_ptr() for tensor in read] == [tensor.data_ptr() for tensor in tensors.values()]


def test_a_step_that_reads_prompts_is_prepared_from_lengths_on_the_cpu():
    """Lengths on the GPU are there only after the step before: to read them would leave the GPU without work meanwhile."""
    from megatron_hylo.serve.vllm.backends import LatentBuilder

    m = SimpleNamespace(
        num_reqs=3, num_actual_tokens=8, max_query_len=4, is_prefilling=None, slot_mapping=torch.arange(8),
        query_start_loc_cpu=torch.tensor([0, 1, 5, 8]), seq_lens=torch.empty(3, dtype=torch.int32, device="meta"),
        seq_lens_cpu_upper_bound=torch.tensor([9, 6, 3]), block_table_tensor=torch.tensor([[1, 2], [3, 4], [5, 0]]),
    )  # fmt: skip
    made = LatentBuilder(SimpleNamespace(block_size=4), ["layer"], None, torch.device("cpu")).build(0, m)
    (prefill,) = made.prefills
    assert made.decodes == 1 and (prefill.tokens, prefill.queries, prefill.keys) == (slice(1, 8), [4, 3], [6, 3])
    assert prefill.query_starts.tolist() == [0, 4, 7] and prefill.key_starts.tolist() == [0, 6, 9]
    assert prefill.blocks.tolist() == [3, 3, 3, 3, 4, 4, 5, 5, 5] and prefill.places.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]


def test_triton_tunes_the_kernels_of_prompts_with_a_long_sequence():
    """vLLM's own method makes the sequence, of a length that its file names; other files' chunks stay as they are."""
    from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn as qwen
    from vllm.third_party.flash_linear_attention.ops import utils

    from megatron_hylo.serve.vllm import gdn

    uses = [line.strip() for line in inspect.getsource(gdn.qwen).splitlines() if "FLA_CHUNK_SIZE" in line]
    assert len(uses) == 2 and uses[1] == "T = FLA_CHUNK_SIZE", "its import, and the length of the sequence alone"
    assert (qwen.FLA_CHUNK_SIZE, utils.FLA_CHUNK_SIZE) == (4096, 64)


@pytest.mark.parametrize("name", ["mla_gdn", "mla_mamba2", "mla_kda"])
def test_preempted_requests_continue_with_the_same_tokens(name, model):
    """Requests whose next page is wanted while they decode, and there is one for the first alone."""
    folder, _ = model(name)
    settings = {"max_model_len": 512, "num_gpu_blocks_override": 10, "enable_prefix_caching": False}
    with engine(folder, **settings, disable_log_stats=False) as llm:
        page = llm.llm_engine.vllm_config.cache_config.block_size
        prompts = random_tokens(*(page - 6 - i for i in range(3)))
        found = tokens(complete(llm, prompts, NEW))
        assert preemptions(llm) > 0
    assert found == right_tokens(folder, prompts)


@pytest.mark.parametrize("name", ["mla_gdn", "mla_mamba2", "mla_kda"])
def test_requests_with_a_cached_prefix_continue_from_its_states(name, model):
    """Two pages that all begin with, of which later requests compute nothing, in steps of a page."""
    folder, _ = model(name)
    with engine(folder, max_model_len=512, enable_prefix_caching=True, max_num_batched_tokens=256) as llm:
        page = llm.llm_engine.vllm_config.cache_config.block_size
        prefix, *tails = random_tokens(2 * page, 1, 9, 40)
        prompts = [prefix + tail for tail in tails]
        outputs = complete(llm, prompts[:1], NEW) + complete(llm, prompts[1:], NEW)
        assert [output.num_cached_tokens for output in outputs] == [0, 2 * page, 2 * page]
    assert tokens(outputs) == right_tokens(folder, prompts)


def random_tokens(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 250, (length,), generator=generator).tolist() for length in lengths]


def right_tokens(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of transformers, none of them near another."""
    expected, gaps = greedy_tokens(folder, prompts, NEW)
    assert min(gaps) > 1e-4, "a tie decides nothing"
    return expected


# before vLLM 0.30 pages of `*` are not padded on CPUs, as they are to be where those of `+` are larger
THREE = "attention_nine_heads" if CACHES_UNLIKE_STATES else "nine_heads"


@pytest.mark.parametrize("name, ranks", [("aligned_bias_gdn", 2), (THREE, 3)])
def test_tensor_parallel_ranks(name, ranks, model, prompts, tmp_path):
    """With q/k-norm, whose heads' scales lie in pages that all ranks have; and three ranks of all mixers."""
    folder, expected = model(name)
    code = (
        "from tests.serve.vllm.engine import *\n"
        "if __name__ == '__main__':\n"
        f"    with engine({str(folder)!r}, tensor_parallel_size={ranks}, disable_custom_all_reduce=True) as llm:\n"
        f"        print(tokens(complete(llm, {prompts}, {NEW})) == {expected})\n"
    )
    script = tmp_path / "ranks.py"
    script.write_text(code)
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH")]))
    cores = sorted(os.sched_getaffinity(0))
    bind = "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": bind, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600, env=os.environ | settings)
    said = run.stdout.splitlines()  # among lines of vLLM's log
    assert run.returncode == 0 and "True" in said and "False" not in said, run.stdout[-2000:] + run.stderr[-4000:]


def test_a_tensor_parallel_size_that_divides_no_heads_is_refused(model):
    folder, _ = model("gdn_wide_heads")
    with pytest.raises(Exception, match="tensor_parallel_size 2 does not divide linear_num_heads 1"):
        with engine(folder, tensor_parallel_size=2):
            pass
