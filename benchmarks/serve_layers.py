"""Gated DeltaNet layers in vLLM: ours beside vLLM's own of Qwen3-Next and Qwen3.5, each alone, random weights.

    python benchmarks/serve_layers.py                                                          # GPU: a layer of the 3B hybrid
    python benchmarks/serve_layers.py --layout llama3.2-1b-4mla12gdn --tokens 128 --batches '[1,4]' --repeats 2      # CPU

All layers have the layout's hidden size and widths of queries, keys, values and gates; vLLM's divide them into heads of 128
channels, two value heads a key head, as Qwen3-Next does. Measures a layer with its projections, without the norm before it and
the MLP: a part of one prompt that continues from a state, launched kernel by kernel as vLLM does, and decode steps, as CUDA
graphs. All run Triton's kernels, outside of torch.compile. Prints each row once it is measured, the table and, last, one JSON
line. On a CPU our layer runs the project's torch kernels and vLLM's its own for CPUs, so there the table compares nothing.
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jsonargparse import auto_cli
from serve import write_folders
from torch import Tensor, nn

from megatron_hylo.cli.boundary import plain_errors

CALLS = 20  # of the layer in a CUDA graph
VLLM_TUNING = 64  # tokens of the sequence that Triton tunes vLLM's layers with


@contextlib.contextmanager
def settings(layout: str, tokens: int, requests: int) -> Iterator[Any]:
    """Make vLLM's settings for the layout's hybrid, current in the block, with groups of one rank."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.network_utils import get_open_port

    with tempfile.TemporaryDirectory() as folder:
        model = write_folders(layout, 4 * tokens, Path(folder))[0]
        config = EngineArgs(
            model=str(model), skip_tokenizer_init=True, load_format="dummy", dtype="bfloat16", max_model_len=4 * tokens,
            max_num_batched_tokens=tokens, max_num_seqs=requests, enable_prefix_caching=False,
        ).create_engine_config()  # fmt: skip
    config.cache_config.mamba_block_size = 4 * tokens  # one state a request
    with set_current_vllm_config(config):
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, backend)
        initialize_model_parallel(1, 1)
        try:
            yield config
        finally:
            cleanup_dist_env_and_memory()


def make_layers(config: Any, width: int) -> dict[str, tuple[Any, str]]:
    """Make the layers to compare, by name, and the dtype of their states as the models set it."""
    from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention
    from vllm.model_executor.model_loader.utils import process_weights_after_loading
    from vllm.model_executor.model_loader.weight_utils import initialize_dummy_weights

    from megatron_hylo.serve.vllm.gdn import HyloGatedDeltaNet

    hybrid = config.model_config.hf_config
    c = hybrid.architecture()
    keys, values = (c.linear_num_heads * size for size in (c.linear_key_head_dim, c.linear_value_head_dim))
    sizes = SimpleNamespace(
        hidden_size=c.hidden_size, hidden_act="silu", rms_norm_eps=c.layernorm_epsilon, linear_num_key_heads=keys // width,
        linear_num_value_heads=values // width, linear_key_head_dim=width, linear_value_head_dim=width,
        linear_conv_kernel_dim=c.linear_conv_kernel_dim,
    )  # fmt: skip
    if keys % width or values % keys:
        raise SystemExit(f"--width {width} does not divide the layout's keys of {keys} channels or they its values of {values}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = torch.get_default_dtype()
    torch.set_default_dtype(config.model_config.dtype)
    with device:
        found = {
            "HyLo": (HyloGatedDeltaNet(hybrid, 0, config, "layers.0.linear_attn"), "float32"),
            "vLLM, Qwen3.5": (QwenGatedDeltaNetAttention(sizes, config, "layers.1.linear_attn"), "float32"),
            "vLLM, Qwen3-Next": (QwenGatedDeltaNetAttention(sizes, config, "layers.2.linear_attn", True), "auto"),
        }
    torch.set_default_dtype(default)
    if device.type == "cpu":  # whose kernels take states in fp32 alone
        found = {name: (layer, "float32") for name, (layer, _) in found.items()}
    layers = nn.ModuleList(layer for layer, _ in found.values())
    initialize_dummy_weights(layers, config.model_config)
    process_weights_after_loading(layers, config.model_config, device)
    return found


def metadata(layer: Any, config: Any, queries: int, lengths: list[int], device: torch.device) -> Any:
    """Make the metadata of a step: requests with `queries` new tokens each, `lengths` tokens with those, a state each."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    count = len(lengths)
    starts = torch.arange(count + 1, dtype=torch.int32) * queries
    seen = torch.tensor(lengths, dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts.to(device), query_start_loc_cpu=starts, seq_lens=seen.to(device), seq_lens_cpu_upper_bound=seen,
        num_reqs=count, num_actual_tokens=count * queries, max_query_len=queries, max_seq_len=max(lengths),
        block_table_tensor=torch.arange(1, count + 1, dtype=torch.int32, device=device)[:, None],
        slot_mapping=torch.zeros(count * queries, dtype=torch.int64, device=device),
    )  # fmt: skip
    builder = layer.get_attn_backend().get_builder_cls()
    return builder(layer.get_kv_cache_spec(config), [layer.prefix], config, device).build(0, common)


def seconds_a_call(step: Callable[[], Any], repeats: int) -> float:
    """Seconds of one call out of `repeats` in a row, after three that are not timed."""
    for _ in range(3):
        step()
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - begin) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def captured(step: Callable[[], Any]) -> tuple[Callable[[], Any], int]:
    """Capture calls of a step as a CUDA graph: its replay, and how many calls it makes; on a CPU the step itself."""
    if not torch.cuda.is_available():
        return step, 1
    step()  # compiles kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            step()
    return graph.replay, CALLS


@torch.inference_mode()
def measure(name: str, layer: Any, config: Any, tokens: int, batches: list[int], repeats: int) -> dict[str, Any]:
    """Measure a layer: milliseconds of a prompt's part and of decode steps by the number of requests."""
    from vllm.forward_context import set_forward_context

    device = layer.dt_bias.device
    states = tuple(zip(layer.get_state_shape(), layer.get_state_dtype()))
    layer.kv_cache = tuple(torch.zeros(max(batches) + 1, *shape, dtype=dtype, device=device) for shape, dtype in states)

    def inputs(count: int) -> Tensor:
        return torch.randn(count, layer.hidden_size, device=device).to(config.model_config.dtype)

    with set_forward_context(None, config, 64):  # as vLLM does at start: Triton tunes kernels
        layer(inputs(64))
    row = {"layer": name, "state_mib": sum(part[0].nbytes for part in layer.kv_cache) / 2**20, "decode_ms": {}}
    row |= {"heads": f"{layer.num_k_heads} x {layer.head_k_dim} / {layer.num_v_heads} x {layer.head_v_dim}"}
    x = inputs(tokens)
    with set_forward_context({layer.prefix: metadata(layer, config, tokens, [3 * tokens], device)}, config, tokens):
        if not bool(layer(x).isfinite().all()):
            raise RuntimeError(f"{name}: outputs are not finite")
        row["prompt_ms"] = 1e3 * seconds_a_call(partial(layer, x), repeats)
    for requests in batches:
        x = inputs(requests)
        with set_forward_context({layer.prefix: metadata(layer, config, 1, [tokens] * requests, device)}, config, requests):
            step, calls = captured(partial(layer, x))
            row["decode_ms"][str(requests)] = 1e3 * seconds_a_call(step, repeats) / calls
    print("MEASURED " + json.dumps(row), flush=True)
    return row


def main(
    layout: str = "llama3.2-3b-6mla22gdn",
    tokens: int = 8192,
    batches: list[int] = [1, 64, 256],  # noqa: B006  jsonargparse shows it
    repeats: int = 20,
    width: int = 128,
    tuning_tokens: int | None = None,
    results: Path = Path("benchmarks/results/serve_layers"),
    commit: str = "",
) -> None:
    """Measure all layers, one after the other.

    Args:
        layout: of the hybrid.
        tokens: new tokens of a part of a prompt.
        batches: requests of a decode step.
        repeats: timed calls.
        width: channels of a head of vLLM's layers.
        tuning_tokens: of the sequence that Triton tunes our layer's kernels with; the plugin's by default.
        results: path without suffix of the .md to write.
        commit: of the code, for the results file.
    """
    from megatron_hylo.serve.vllm import register

    register()
    with settings(layout, tokens, max(batches)) as config:
        from megatron_hylo.serve.vllm.gdn import qwen

        ours, rows = tuning_tokens or qwen.FLA_CHUNK_SIZE, []
        for name, (layer, dtype) in make_layers(config, width).items():
            config.cache_config.mamba_ssm_cache_dtype = dtype
            qwen.FLA_CHUNK_SIZE = VLLM_TUNING if name.startswith("vLLM") else ours
            rows.append(measure(name, layer, config, tokens, batches, repeats))
    write_report(rows, {"layout": layout, "tokens": tokens, "tuning_tokens": ours}, batches, results, commit)


def write_report(rows: list[dict[str, Any]], options: dict[str, Any], batches: list[int], results: Path, commit: str) -> None:
    """Write the table, with times as multiples of vLLM's Qwen3.5 layer, and print the JSON line."""
    import vllm
    from report import device_name, report

    peer = rows[1]

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        times = [(row["prompt_ms"], peer["prompt_ms"])]
        times += [(row["decode_ms"][str(n)], peer["decode_ms"][str(n)]) for n in batches]
        return row["layer"], row["heads"], f"{row['state_mib']:.2f}", *(f"{t:.3f} ({t / theirs:.2f})" for t, theirs in times)

    columns = ("layer", "key heads / value heads", "state (MiB)", f"{options['tokens']:,} tokens of a prompt (ms)")
    columns += tuple(f"decode, {n} request{'s' * (n > 1)} (ms)" for n in batches)
    intro = [
        f"One Gated DeltaNet layer of `{options['layout']}`, and vLLM's own of the same widths in heads of another size; in "
        "brackets times of its Qwen3.5 layer. Qwen3-Next's has its weights interleaved and states in bf16.",
    ]
    how = f"{device_name()}, vLLM {vllm.__version__}, commit {commit or 'not named'}"
    report(results, "Gated DeltaNet layers in vLLM", intro, columns, [cells(row) for row in rows], how)
    print(json.dumps({"benchmark": "serve_layers", "device": device_name(), **options, "rows": rows}))


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
