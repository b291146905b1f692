"""Speed of `hylo preprocess` beside Megatron-LM's tools/preprocess_data.py: the same documents, tokenizer and ids, in one run.

    python benchmarks/preprocess.py --megatron CHECKOUT [--documents 2000] [--workers 1]

CHECKOUT is a copy of github.com/NVIDIA/Megatron-LM, whose tools/preprocess_data.py is run as it is, with this environment's
Megatron-Core. Each runs as a process of its own; CPU seconds are those of the process and its children, start-up included, and
"tokenising" leaves out the CPU seconds of a run on one document. The shorter of two runs counts. The .bin files are compared
byte by byte.
"""

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import megatron.core
import tokenizers

from megatron_hylo.cli.boundary import plain_errors
from megatron_hylo.data.artefacts import fetch_documents, fetch_teacher
from megatron_hylo.data.load_tokenizer import load_transformers_tokenizer

OURS = """
import sys
from megatron_hylo.data.preprocess import preprocess
preprocess(sys.argv[1], sys.argv[2], sys.argv[3], 0.0, overwrite=True, workers=int(sys.argv[4]))
"""


def run(command: list, environment: dict[str, str]) -> tuple[float, float]:
    """(CPU seconds with children, wall-clock seconds) of a command."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([str(word) for word in command], env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[1]} failed:\n{done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, time.perf_counter() - start


def main() -> None:
    """Time both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megatron", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    lines = fetch_documents().read_text(encoding="utf-8").splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    tokenizer = load_transformers_tokenizer(fetch_teacher())
    # the script makes a special token of text that looks like one, and keeps byte order marks
    added = [token.content for token in tokenizer.backend_tokenizer.get_added_tokens_decoder().values()]
    special = re.compile("|".join(map(re.escape, [*added, "\ufeff"])))
    lines = [line for line in lines if not special.search(json.loads(line)["text"])][: options.documents]
    tokenizer.eos_token = "<|endoftext|>"  # with which Megatron-LM ends documents
    root = Path(__file__).parents[1]
    environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        tokenizer.save_pretrained(work / "tokenizer")
        seconds: dict[str, list[float]] = {"megatron_hylo": [], "Megatron-LM": []}
        wall: dict[str, float] = {}
        for name, some in (("one", lines[:1]), ("all", lines)):
            (work / f"{name}.jsonl").write_text("".join(some), encoding="utf-8")
            theirs = [
                sys.executable, options.megatron / "tools" / "preprocess_data.py", "--input", work / f"{name}.jsonl",
                "--output-prefix", work / f"theirs_{name}", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model",
                work / "tokenizer", "--append-eod", "--workers", options.workers,
            ]  # fmt: skip
            ours = [sys.executable, "-c", OURS, work / f"{name}.jsonl", work / f"ours_{name}", work / "tokenizer"]
            ours.append(options.workers)
            for who, command in (("megatron_hylo", ours), ("Megatron-LM", theirs)):
                environment |= {"RAYON_NUM_THREADS": "1"} if options.workers == 1 else {}
                used, wall[who] = min(run(command, environment) for _ in range(2))
                seconds[who].append(used)
        found = (work / "ours_all" / "train.bin").read_bytes()
        equal = found == (work / "theirs_all_text_document.bin").read_bytes()
        tokens = json.loads((work / "ours_all" / "data.json").read_text())["train_tokens"]
    text = sum(len(json.loads(line)["text"]) for line in lines)
    print(f"{len(lines):,} documents, {text:,} characters, {tokens:,} tokens; the same bytes: {equal}")
    print(f"{'':16}{'CPU s in all':>14}{'tokenising':>12}{'tokens a CPU s':>16}{'wall-clock s':>14}")
    rates = {}
    for who, (one, every) in seconds.items():
        rates[who] = tokens / (every - one)
        print(f"{who:16}{every:14.1f}{every - one:12.1f}{rates[who]:16,.0f}{wall[who]:14.1f}")
    ratio = rates["megatron_hylo"] / rates["Megatron-LM"]
    print(f"ratio of tokenising: {ratio:.1f}")
    print(
        json.dumps(
            {
                "documents": len(lines), "tokens": tokens, "workers": options.workers, "same_bytes": equal,
                "tokens_per_cpu_second": {who: round(rate) for who, rate in rates.items()}, "ratio": round(ratio, 2),
                "cpu_seconds": {who: round(every, 1) for who, (_, every) in seconds.items()},
                "tokenizers": tokenizers.__version__, "megatron_core": megatron.core.__version__,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    with plain_errors("benchmark"):
        main()
