"""RULER through our model class of lm-eval beside lm-eval's own, on the same weights: examples a second.

    python benchmarks/evaluation.py MODEL --length 32768 --examples 16

MODEL is what `hylo eval` takes. Each contender first answers all examples in `WARM_TOKENS` tokens, so that kernels are compiled
(a batch that memory limits may hold more of them than when it is timed). Then all are timed in turn, `--rounds` times; the
fastest round counts. Examples are made before the clock starts. Prefill is the time of the same requests for one token each,
tokenising included; decode is the rest. lm-eval's class has batches of one, its default, and of `--peer_batch`; ours has its
own and `--peer_batch` too.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.eval import lm as our_class
from megatron_hylo.eval.lm import HyloLM
from megatron_hylo.eval.ruler.run import plan_ruler

TASKS = ("niah_single_1", "niah_multikey_2", "vt", "cwe", "fwe")  # those without other data
WARM_TOKENS = 16


class Contender:
    """A model class of lm-eval and the requests that it is measured by.

    Args:
        lm: the model class.
        length, examples, tasks: of RULER.
    """

    def __init__(self, lm: Any, length: int, examples: int, tasks: list[str]) -> None:
        self.lm, self.generate, self.asked = lm, lm.generate_until, (length, tasks, examples)
        self.requests: list[list[Instance]] = []  # of each call
        self.answers: list[list[str]] = []
        self.rounds: list[dict[str, float]] = []

        def keep(requests: list[Instance]) -> list[str]:
            self.requests.append(requests)
            return [""] * len(requests)

        self._score(keep)

    def _score(self, answer: Callable[[list[Instance]], list[str]]) -> float:
        """Mean score of RULER where each call is answered so."""
        self.lm.generate_until = lambda requests, **settings: answer(requests)
        length, tasks, examples = self.asked
        scores, _ = plan_ruler(self.lm, [length], tasks, examples)()
        return next(score.value for score in scores if score.task == "mean")

    def warm_up(self) -> None:
        """Compile what is needed for these prompts and batches."""
        self._timed(WARM_TOKENS)

    def measure(self) -> None:
        """Add a round."""
        prefill, _ = self._timed(1)
        seconds, answers = self._timed(None)
        self.rounds.append({"seconds": seconds, "prefill_seconds": prefill, "decode_seconds": seconds - prefill})
        self.answers = answers

    def texts(self) -> list[str]:
        """Answers of the last round."""
        return [text for call in self.answers for text in call]

    def result(self, reference: list[str]) -> dict[str, Any]:
        """Fastest round, all rounds' seconds, and the share of answers that equal the reference's."""
        count = sum(map(len, self.requests))
        best = min(self.rounds, key=lambda one: one["seconds"])
        every = [round(one["seconds"], 3) for one in self.rounds]
        answers = list(self.answers)
        equal = statistics.fmean(mine == other for mine, other in zip(self.texts(), reference, strict=True))
        found = {
            "examples": count,
            "score": self._score(lambda requests: answers.pop(0)),
            "equal_answers": equal,
            "rounds": every,
        }
        return {"examples_per_second": count / best["seconds"], **best, **found}

    def _timed(self, tokens: int | None) -> tuple[float, list[list[str]]]:
        """(seconds, answers of each call) of all requests, with at most so many new tokens."""
        calls = self.requests if tokens is None else [[_shorter(one, tokens) for one in call] for call in self.requests]
        start = time.perf_counter()
        answers = [self.generate(call, disable_tqdm=True) for call in calls]
        if self.lm.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, answers


def _shorter(request: Instance, tokens: int) -> Instance:
    prompt, settings = request.args
    settings = {**settings, "max_gen_toks": min(tokens, settings["max_gen_toks"])}
    return Instance(request.request_type, request.doc, (prompt, settings), request.idx)


def note_batches(sizes: set[int]) -> None:
    """Add the sizes of all batches that our class decodes from now on."""
    decode = our_class.decode_greedily

    def noting(model: Any, prompts: Any, *rest: Any) -> Any:
        sizes.add(len(prompts))
        return decode(model, prompts, *rest)

    our_class.decode_greedily = noting  # type: ignore[assignment]


def main() -> None:
    """Print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--examples", type=int, default=16, help="of each task")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--peer_batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max_length", type=int, help="window, where it is to be longer than the model's own")
    given = parser.parse_args()
    tasks, size = given.tasks.split(","), given.peer_batch
    ours = HyloLM(given.model, max_length=given.max_length)
    shared = dict(tokenizer=ours.tokenizer, max_length=ours.max_length)
    named: dict[str, Any] = {"ours": ours, f"ours, batch {size}": HyloLM(ours.model, batch_size=size, **shared)}
    for peer in dict.fromkeys((1, size)):
        named[f"lm-eval hf, batch {peer}"] = HFLM(ours.model, batch_size=peer, **shared)
    contenders = {name: Contender(lm, given.length, given.examples, tasks) for name, lm in named.items()}
    sizes: set[int] = set()
    note_batches(sizes)
    for name, contender in contenders.items():
        contender.warm_up()
        if name == "ours":
            batches = sorted(sizes)
    for number in range(given.rounds):
        for name, contender in contenders.items():  # a line as soon as it is known: the peer takes minutes
            contender.measure()
            print(f"round {number + 1}: {name}: {contender.rounds[-1]['seconds']:.2f} s", flush=True)
    reference = contenders["ours"].texts()
    found = {name: contender.result(reference) for name, contender in contenders.items()}
    for name, v in found.items():
        parts = f"{v['prefill_seconds']:.2f} prefill, {v['decode_seconds']:.2f} decode"
        print(
            f"{name:24}  {v['examples_per_second']:8.3f} examples/s  {v['seconds']:8.2f} s: {parts}  score {v['score']:.3f}  "
            f"{v['equal_answers']:.0%} as ours"
        )
    print("batches of ours:", ", ".join(map(str, batches)))
    ratios = {f"times {name}": found["ours"]["examples_per_second"] / v["examples_per_second"] for name, v in found.items()}
    device = torch.cuda.get_device_name() if ours.device.type == "cuda" else "CPU"
    print(json.dumps({"device": device, "length": given.length, "tasks": tasks, "batches": batches} | ratios | found))


if __name__ == "__main__":
    with plain_errors("benchmark"):
        main()
