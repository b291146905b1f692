"""Products of one vector with the matrices of a decode step, by our kernel and by torch's: bytes of weights a second.

    python benchmarks/matvec.py

Shapes of the 3B hybrid. For each block of rows and columns and number of warps; kernels/matvec.py holds the choice.
"""

import itertools
import json

import torch
import torch.nn.functional as F
from report import device_name
from triton.testing import do_bench

from megatron_hylo.kernels.triton_matvec import multiply

SHAPES = {  # rows, columns, SwiGLU
    "input of Gated DeltaNet": (13842, 3072, False),
    "output of Gated DeltaNet": (3072, 4608, False),
    "gate and up": (8192, 3072, True),
    "down": (3072, 8192, False),
    "head": (128_256, 3072, False),
}


def main() -> None:
    """Print a line a shape: torch's TB/s, then ours, the fastest blocks first; last, one JSON line."""
    found = {}
    for name, (rows, columns, swiglu) in SHAPES.items():
        weight = torch.randn(rows * (1 + swiglu), columns, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(1, 1, columns, device="cuda", dtype=torch.bfloat16)
        out, terabytes = x.new_empty(1, 1, rows), weight.nbytes / 1e12
        speeds = {"torch": terabytes / do_bench(lambda: F.linear(x, weight), warmup=5, rep=20) * 1e3}
        for tile, width, warps in itertools.product((2, 4, 8), (512, 1024), (4, 8)):
            sizes = dict(WIDTH=columns, ROWS=tile, COLUMNS=width, EVEN=columns % width == 0 and rows % tile == 0)

            def run() -> None:
                multiply[(-(-rows // tile),)](
                    x, weight, x, out, rows, columns, **sizes, SWIGLU=swiglu, RESIDUAL=False, num_warps=warps
                )

            speeds[f"{tile} x {width}, {warps} warps"] = terabytes / do_bench(run, warmup=5, rep=20) * 1e3
        found[name] = dict(sorted(speeds.items(), key=lambda pair: pair[0] != "torch" and -pair[1]))
        print(name, [rows, columns], {key: round(value, 2) for key, value in found[name].items()}, flush=True)
    print(json.dumps({"benchmark": "matvec", "device": device_name(), "terabytes_per_second": found}))


if __name__ == "__main__":
    with torch.no_grad():
        main()
