"""Made results folders: of a model that recalls less the longer the text, with every suite."""

import random
from pathlib import Path

from megatron_hylo.eval.results import EvalResult, Sample, Score, Suite, mean, mean_by_group

LENGTHS, DEPTHS = (4096, 8192, 16384), (0.0, 0.25, 0.5, 0.75, 1.0)
RULER = ("niah_single_1", "niah_multikey_2", "vt", "cwe", "fwe", "qa_1")
COMMONSENSE = ("arc_easy", "hellaswag", "piqa")


def scored(samples: list[Sample], **more) -> Score:
    """Score of one task's samples."""
    value, error = mean_by_group([s.score for s in samples], [s.group or f"{s.depth} {s.example}" for s in samples])
    first = samples[0]
    return Score(first.suite, first.task, first.metric, value, error, len(samples), first.length, **more)


def make_result(name: str, skill: float, seed: int = 0, examples: int = 40) -> EvalResult:
    """Results of a model that is right with probability `skill`, less at greater lengths; hard examples are hard for all."""
    generator, hardness = random.Random(f"{name} {seed}"), random.Random(seed)
    result = EvalResult(
        {"name": name, "path": f"/models/{name}", "kind": "Megatron model", "hash": "0123456789abcdef" * 4,
         "parameters": 184_000_000, "kv_percent": 100.0 if name == "teacher" else 11.1},
        {"command": f"hylo eval /models/{name} --suite all", "commit": "0" * 40, "version": "0.2.0",
         "libraries": {"torch": "2"}, "devices": ["node7: GPU"], "dtype": "bf16", "seed": seed,
         "time": "2026-11-29T11:00:00Z", "seconds": 321.0,
         "settings": {"limit": examples}},
    )  # fmt: skip

    def ask(suite: Suite, task: str, metric: str, count: int, length: int | None = None, depth: float | None = None) -> Score:
        made = []
        for number in range(count):
            chance = 1.6 * skill * hardness.random() ** 0.5 / (1 + (length or 0) / 30_000)
            right = generator.random() < chance
            answer = str(10_000 + number)
            made.append(
                Sample(suite, task, metric, f"{seed}/{number}", float(right), length, depth,
                       f"... <b>The number</b> is {number}.\nWhat is the number?", answer, answer if right else "no idea")
            )  # fmt: skip
        result.samples += made
        return scored(made, depth=depth)

    for length in LENGTHS:
        cells = [ask("recall", "passkey", "exact", examples // 2, length, depth) for depth in DEPTHS]
        whole = [s for s in result.samples if (s.suite, s.length) == ("recall", length)]
        result.scores += [scored(whole), *cells, mean([scored(whole)])]
        tasks = [ask("ruler", task, "match", examples, length) for task in RULER]
        result.scores += [*tasks, mean(tasks)]
        losses = [Sample("ppl", "by_position", "perplexity", f"{length}/{i}", hardness.uniform(14, 16) / (0.5 + 0.6 * skill)
                         * generator.uniform(0.99, 1.01), length) for i in range(8)]  # fmt: skip
        result.samples += losses
        value = sum(s.score for s in losses) / len(losses)
        result.scores.append(Score("ppl", "by_position", "perplexity", value, 0.1, 8, length, higher_is_better=False))
    tasks = [ask("commonsense", task, "acc", examples) for task in COMMONSENSE]
    result.scores += [*tasks, mean(tasks), ask("gsm8k", "gsm8k", "exact_match", examples)]
    result.scores[-1] = Score(**{**vars(result.scores[-1]), "note": "subset"})
    return result


def write_results(folder: Path, **names: float) -> list[Path]:
    """Results folders of models by name and skill."""
    folders = [folder / name for name in names]
    for path, skill in zip(folders, names.values()):
        make_result(path.name, skill).write(path)
    return folders
