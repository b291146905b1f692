"""RULER through our model class of lm-eval beside lm-eval's own, on the same weights: examples a second.

    python benchmarks/evaluation.py MODEL --length 32768 --examples 16

MODEL is what `hylo eval` takes. Examples are made before the clock starts. lm-eval's class has batches of one, its default, and
of --peer_batch.
"""

import argparse
import json
import os
import time
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from lm_eval.models.huggingface import HFLM

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.eval.lm import HyloLM
from megatron_hylo.eval.ruler.run import plan_ruler

TASKS = ("niah_single_1", "niah_multikey_2", "vt", "cwe", "fwe")  # those without other data


def measure(lm: Any, length: int, examples: int, tasks: list[str]) -> dict[str, float]:
    """Answer the examples of all tasks; the time is that of generate_until alone."""
    generate, spent, done = lm.generate_until, [0.0], [0]

    def timed(requests: list, **settings: Any) -> list[str]:
        start = time.perf_counter()
        found = generate(requests, **settings)
        if lm.device.type == "cuda":
            torch.cuda.synchronize()
        spent[0] += time.perf_counter() - start
        done[0] += len(requests)
        return found

    lm.generate_until = timed
    try:
        scores, _ = plan_ruler(lm, [length], tasks, examples)()
    finally:
        lm.generate_until = generate
    mean = next(score.value for score in scores if score.task == "mean")
    return {"examples_per_second": done[0] / spent[0], "seconds": spent[0], "examples": done[0], "score": mean}


def main() -> None:
    """Print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--examples", type=int, default=16, help="of each task")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--peer_batch", type=int, default=4)
    parser.add_argument("--max_length", type=int, help="window, where it is to be longer than the model's own")
    given = parser.parse_args()
    tasks = given.tasks.split(",")
    ours = HyloLM(given.model, max_length=given.max_length)
    named: dict[str, Any] = {"ours": ours}
    for size in dict.fromkeys((1, given.peer_batch)):
        named[f"lm-eval hf, batch {size}"] = HFLM(
            ours.model, tokenizer=ours.tokenizer, batch_size=size, max_length=ours.max_length
        )
    measure(ours, given.length, 1, tasks)  # compiles kernels
    found = {}
    for name, lm in named.items():  # a row as soon as it is known: the peer takes minutes
        v = found[name] = measure(lm, given.length, given.examples, tasks)
        print(
            f"{name:24}  {v['examples_per_second']:8.3f} examples/s  {v['seconds']:8.1f} s  score {v['score']:.3f}", flush=True
        )
    ratios = {f"times {name}": found["ours"]["examples_per_second"] / v["examples_per_second"] for name, v in found.items()}
    device = torch.cuda.get_device_name() if ours.device.type == "cuda" else "CPU"
    print(json.dumps({"device": device, "length": given.length, "tasks": tasks} | ratios | found))


if __name__ == "__main__":
    with plain_errors("benchmark"):
        main()
