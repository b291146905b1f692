"""`hylo eval`: suites through lm-eval, on any model of any stage; `hylo evaluate`: held-out perplexity and KL to a teacher."""

import contextlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from megatron_hylo.cli.console import console, print_json, results, track
from megatron_hylo.cli.types import PositiveInt
from megatron_hylo.config import ConfigError, TeacherWindow
from megatron_hylo.config.evaluation import SMOKE, SUITES, SuiteSettings
from megatron_hylo.config.teacher_window import OWN_WINDOW
from megatron_hylo.convert.source_path import check_model
from megatron_hylo.data.dataset_path import check_indexed_dataset
from megatron_hylo.eval.installed import require_lm_eval
from megatron_hylo.io import is_launched_first, launched_ranks, on_main
from megatron_hylo.io.start_up import model_imports
from megatron_hylo.models.description import read_description

if TYPE_CHECKING:
    from megatron_hylo.eval.results import EvalResult


def eval(
    model: Path,
    suite: str = "all",
    data: Path | None = None,
    output: Path | None = None,
    limit: PositiveInt | None = None,
    lengths: list[PositiveInt] | None = None,
    sequence_length: PositiveInt | None = None,
    seed: int = 1234,
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    max_length: PositiveInt | None = None,
    batch_size: str = "auto",
    online: bool = False,
    generated: bool = False,
    chat: bool = False,
    essays: Path | None = None,
    squad: Path | None = None,
    hotpot: Path | None = None,
    json: bool = False,
    overwrite: bool = False,
) -> None:
    """Measure a model by suites, through lm-eval: perplexity, recall, RULER, common sense, GSM8K.

    Takes a model of any stage without an export. Under torchrun each rank has the whole model and a part of the examples.

    Args:
        model: Hugging Face folder, exported hybrid, .gguf file, model folder, or checkpoint of a run that still trains.
        suite: ppl, recall, ruler, commonsense, gsm8k, several with commas, all, or smoke (all, with one example of 1,024 tokens
            of each task, unless told otherwise: whether a model can be measured, in minutes).
        data: dataset folder of `hylo preprocess`, whose held-out text ppl and recall need.
        output: results folder to make, which `hylo compare` reads; without, results are only shown.
        limit: examples of each task, and of each length where it has lengths.
        lengths: tokens of a context of ppl, recall and ruler, as [4096,8192]; by default the suites' own up to max_length.
        sequence_length: tokens of a window of ppl, 2,048 by default.
        seed: of examples that are drawn.
        dtype: of weights and activations; auto: bf16 on GPUs, fp32 on the CPU.
        max_length: longest prompt with its answer; by default what the model was trained for.
        batch_size: sequences of a batch; auto: by the memory.
        online: download lm-eval's data where it is not in the cache, in place of rows from PyPI.
        generated: the model writes recall's answers, instead of being asked for each token after the right ones.
        chat: wrap RULER's prompts in the chat template.
        essays: text of RULER's haystacks, in place of essays from PyPI.
        squad: dev-v2.0.json, for RULER's qa_1.
        hotpot: hotpot_dev_distractor_v1.json, for RULER's qa_2.
        json: print what results.json holds.
        overwrite: replace a results folder.
    """
    from megatron_hylo.io import check_free

    usual: dict[str, Any] = SMOKE if suite == "smoke" else {"limit": None, "lengths": None, "sequence_length": 2048}
    names = list(SUITES) if suite in ("all", "smoke") else [name.strip() for name in suite.split(",") if name.strip()]
    known = [name for name in SUITES if name in names]
    if not names:
        raise ConfigError(f"--suite names none; choose out of {', '.join(SUITES)}, all or smoke")
    unknown: list[Any] = [name for name in names if name not in SUITES]  # SuiteSettings refuses them
    text, haystack, first, second = (None if path is None else str(path) for path in (data, essays, squad, hotpot))
    sizes = limit or usual["limit"], lengths or usual["lengths"], sequence_length or usual["sequence_length"]
    settings = SuiteSettings(known + unknown, text, *sizes, seed, online, generated, chat, haystack, first, second)
    require_lm_eval("hylo eval")
    if output is not None:
        check_free(output, overwrite, [model, data])
    check_model(model)
    if data is not None and "ppl" in settings.suites:
        check_indexed_dataset(data / "heldout")
    found = measure(model, settings, dtype, max_length, batch_size, output)
    if not is_launched_first():
        return
    if json:  # shown first, since the output's disk may be full
        print_json(found.to_dict())
    else:
        _show(found)
    if output is not None:
        from megatron_hylo.eval.parts import remove_parts
        from megatron_hylo.eval.results_page import REPORT, write_report

        found.write(output, overwrite, also=write_report)
        remove_parts(output)
        console.print(f"wrote {output}; open {output}/{REPORT}", soft_wrap=True)


def evaluate(
    model: Path,
    data: Path,
    teacher: Path | None = None,
    sequence_length: PositiveInt = 2048,
    windows: PositiveInt = 32,
    teacher_window: TeacherWindow = OWN_WINDOW,
) -> None:
    """Print held-out perplexity of a model as JSON and, with a teacher, KL to it and top-1 agreement.

    Args:
        model: model folder or training checkpoint.
        data: dataset folder made by `hylo preprocess`.
        teacher: model folder to compare with.
        sequence_length: tokens a window.
        windows: windows at most.
        teacher_window: how the teacher reads more tokens than its window has: --teacher_window.mode rope or windows.
    """
    for folder in (model, teacher):
        if folder is not None:
            read_description(folder)
    check_indexed_dataset(data / "heldout")
    with model_imports():
        from megatron_hylo.eval.folders import evaluate_folder
        from megatron_hylo.platform.distributed import session

    with session():
        quality = evaluate_folder(model, data, teacher, sequence_length, windows, track, teacher_window)
    print_json(quality.to_dict())


def measure(
    model: Path,
    settings: SuiteSettings,
    dtype: str = "auto",
    max_length: int | None = None,
    batch_size: str = "auto",
    output: Path | None = None,
) -> "EvalResult":
    """Open a model and run suites, on all ranks of a torchrun; complete on the first.

    Arguments as of `hylo eval`. Finished parts are kept beside the output, if there is to be one, until `remove_parts`.
    """
    with model_imports():
        from megatron_hylo.eval.lm import HyloLM
        from megatron_hylo.eval.lm_facts import describe_model, describe_run, parts_key
        from megatron_hylo.eval.parts import KeptParts, run_part
        from megatron_hylo.eval.results import EvalResult
        from megatron_hylo.eval.suites import fetch_inputs, run_suites
        from megatron_hylo.models.checks import require_finite
        from megatron_hylo.platform.distributed import session

    started = time.time()
    fetch_inputs(settings)
    with session() if launched_ranks() > 1 else contextlib.nullcontext():
        lm = HyloLM(model, dtype=dtype, max_length=max_length, batch_size=batch_size, seed=settings.seed, track=track)
        require_finite(lm.model, model)
        # before the suites: a training run may replace its checkpoint meanwhile
        about = on_main(lambda: describe_model(model, lm, track))
        kept = None
        if output is not None:
            key = on_main(lambda: parts_key(about, describe_run(lm, asdict(settings), started)))
            kept = KeptParts(output, key)
        scores, samples = run_suites(lm, settings, track, kept or run_part)
        run = describe_run(lm, asdict(settings), started) | ({"kept_parts": len(kept.done)} if kept and kept.done else {})
        return EvalResult(about, run, scores, samples)


def _show(found: "EvalResult") -> None:
    """Print the scores over all depths as a table."""
    about = found.model
    kv = "" if about["kv_percent"] is None else f", KV {about['kv_percent']:.1f} %"
    table = Table(title=f"{about['name']} ({about['kind']}): {about['parameters']:,} parameters{kv}")
    for name in ("suite", "task", "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("length", "value", "± s.e.", "examples"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("note")
    for score in found.scores:
        if score.depth is None:
            digits = 2 if score.metric == "perplexity" else 3
            table.add_row(
                score.suite, score.task, score.metric, "" if score.length is None else f"{score.length:,}",
                f"{score.value:,.{digits}f}", "" if score.stderr is None else f"{score.stderr:,.{digits}f}",
                f"{score.examples:,}", score.note,
            )  # fmt: skip
    results.print(table)
