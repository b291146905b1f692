"""How long calibration and initialisation of one layer take, at the shape of an 8B model, with random weights.

    python benchmarks/initialisation.py
    python benchmarks/initialisation.py --hidden_size 576 --num_attention_heads 9 --num_query_groups 3 --kv_channels 64

Times whole commands on a model of one layer: reading it, what is measured or solved, evaluation, writing it.
Prints a table and, last, one JSON line; writes RESULTS.md.
"""

import json
import tempfile
import time
from pathlib import Path

import torch
from jsonargparse import auto_cli
from report import device_name, random_text, report

from megatron_hylo.calibrate.gather import calibrate
from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.config import ModelConfig
from megatron_hylo.config.upcycle import UpcycleConfig
from megatron_hylo.models.checkpoint import save_model
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.platform.distributed import session
from megatron_hylo.upcycle.run import upcycle_folder

MIXERS = {"MLA": "+-", "Gated DeltaNet": "G-", "Mamba2": "M-"}


def main(
    hidden_size: int = 4096,
    ffn_hidden_size: int = 14336,
    num_attention_heads: int = 32,
    num_query_groups: int = 8,
    kv_channels: int = 128,
    tokens: int = 65_536,
    sequence_length: int = 2048,
    results: Path = Path("benchmarks/results/initialisation"),
    commit: str = "",
) -> None:
    """Calibrate a random layer, then make each kind of mixer of it.

    Args:
        hidden_size, ffn_hidden_size, num_attention_heads, num_query_groups, kv_channels: of the layer.
        tokens: of calibration.
        sequence_length: tokens of a window.
        results: path without suffix of the .md to write.
        commit: of the code, for the results file.
    """
    vocabulary, rows = 4 * hidden_size, []  # a layer that sees few different inputs is refused
    config = ModelConfig(
        hybrid_layer_pattern="*-", hidden_size=hidden_size, ffn_hidden_size=ffn_hidden_size, kv_channels=kv_channels,
        num_attention_heads=num_attention_heads, num_query_groups=num_query_groups, vocab_size=vocabulary,
        max_position_embeddings=8192, rotary_base=500_000.0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch, session():
        folder = Path(scratch)
        sizes = {"train": (2 * tokens // sequence_length, sequence_length + 1), "heldout": (4, sequence_length + 1)}
        random_text(folder / "data", vocabulary, sizes)
        torch.manual_seed(0)
        model = build_model(config)
        torch.nn.init.normal_(model.embedding.word_embeddings.weight)
        save_model(model, folder / "teacher")
        del model
        seconds = _seconds(
            lambda: calibrate(folder / "teacher", folder / "data", folder / "calibration", tokens, sequence_length, heldout=2)
        )
        rows.append(("calibrate", seconds))
        for name, pattern in MIXERS.items():
            settings = UpcycleConfig(
                f"{folder}/teacher", f"{folder}/student", pattern=pattern, calibration=f"{folder}/calibration", overwrite=True
            )
            seconds = _seconds(lambda settings=settings: upcycle_folder(settings))
            rows.append((f"initialise and solve, {name}", seconds))
    name = device_name()
    shape = f"{hidden_size} wide, {num_attention_heads}/{num_query_groups} heads of {kv_channels}, MLP {ffn_hidden_size}"
    intro = f"{shape}, random weights in fp32, {tokens:,} tokens in windows of {sequence_length:,}."
    cells = [(what, f"{seconds:.1f}") for what, seconds in rows]
    title, how = "Time to calibrate and to initialise one layer", f"{name}, commit {commit}"
    report(results, title, [intro], ("one layer", "seconds"), cells, how)
    print(json.dumps({"benchmark": "initialisation", "device": name, "shape": shape, "seconds": dict(rows)}))


def _seconds(run) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    with plain_errors("benchmark"):
        auto_cli(main)
