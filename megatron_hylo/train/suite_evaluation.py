"""Callback that runs suites of an evaluation on a run's students, and keeps the best one."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_hylo.config import ConfigError
from megatron_hylo.config.evaluation import SuiteSettings
from megatron_hylo.config.layouts import parameter_count
from megatron_hylo.config.paths import hugging_face_folder
from megatron_hylo.config.train import PREFIXES, TrainConfig
from megatron_hylo.eval.installed import require_lm_eval
from megatron_hylo.eval.results import Score
from megatron_hylo.io import on_main, read_json, write_json
from megatron_hylo.models.checkpoint import save_model
from megatron_hylo.models.gather import gather_model
from megatron_hylo.plan.memory import GIB
from megatron_hylo.train.callback import Callback, Progress
from megatron_hylo.train.reporting import Reporter
from megatron_hylo.train.run_folder import tokenizer_place
from megatron_hylo.train.setup import Run

logger = logging.getLogger("megatron_hylo.train")
BEST, BEST_MODEL = "best.json", "best_model"


def prepare_suites(config: TrainConfig) -> SuiteSettings | None:
    """Check what the suites of a run need and download it, before its ranks are joined; None where it has none.

    Raises:
        ConfigError: lm-eval is not installed, or the run's models have no tokenizer.
    """
    settings = config.suite_settings()
    if settings is None:
        return None
    require_lm_eval("evaluation.suites")
    if not any(hugging_face_folder(source) for source in (config.model, config.teacher) if source):  # those are read later
        tokenizer_folder(config)
    from megatron_hylo.eval.suites import fetch_inputs

    fetch_inputs(settings)
    return settings


def tokenizer_folder(config: TrainConfig) -> Path:
    """Tokenizer of the model, of its teacher or of the text, the first there is.

    Raises:
        ConfigError: there is none.
    """
    sources = [source for source in (config.model, config.teacher, config.data) if source is not None]
    places = (tokenizer_place(source, Path(config.output)) for source in sources)
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise ConfigError(f"evaluation.suites needs a tokenizer, and none of {', '.join(sources)} has one; preprocess again")
    return found


class SuiteEvaluation(Callback):
    """Runs suites every `evaluation.every` steps and at the end; RUN/best_model is the best student by `evaluation.keep_best`.

    Args:
        run: whose students are measured. Each rank measures a part of the examples with a copy of the whole model, gathered
            for that where tensor, pipeline or expert parallelism divides it; afterwards the copy's memory is free again.
        settings: of the suites.
        reporter: records metrics eval/SUITE/TASK/METRIC, of a length with /LENGTH behind it.
        folder: run folder.
        provenance: of the first student, for the best model's hylo.json.
    """

    def __init__(self, run: Run, settings: SuiteSettings, reporter: Reporter, folder: Path, provenance: dict[str, Any]) -> None:
        from megatron_hylo.data.load_tokenizer import load_transformers_tokenizer

        self.run, self.settings, self.reporter, self.folder, self.provenance = run, settings, reporter, folder, provenance
        self.tokenizer = load_transformers_tokenizer(tokenizer_folder(run.config))
        p = run.config.parallel
        self.divided = p.tensor_model_parallel_size * p.pipeline_stages * p.expert_model_parallel_size > 1
        if self.divided:
            shape = run.students[0][0].config
            gib = parameter_count(shape.hylo) * shape.params_dtype.itemsize / GIB
            reporter.say(f"evaluation.suites: every rank has the whole model for them, {gib:.1f} GiB beside its part")

    def after_step(self, progress: Progress) -> None:
        """Run the suites at their interval."""
        config = self.run.config
        if progress.step % config.evaluation.every == 0 and progress.step < config.train_steps:
            self._measure(progress.step)

    def at_end(self, progress: Progress) -> None:
        """Run the suites on the trained students."""
        self._measure(progress.step)

    def _measure(self, step: int) -> None:
        from megatron_hylo.convert.open_model import hf_model
        from megatron_hylo.eval.lm import HyloLM
        from megatron_hylo.eval.suites import run_suites

        for prefix, state in zip(PREFIXES, self.run.states):
            model = hf_model(gather_model(state.chunks) if self.divided else state.chunks[0])
            lm = HyloLM(torch.nn.Module.to(model, self.run.device).eval(), self.tokenizer, seed=self.settings.seed)
            scores, _ = run_suites(lm, self.settings)
            del model, lm
            metrics = {metric_name(score): score for score in scores if score.depth is None}
            self.reporter.record(step, {f"{prefix}eval/{name}": score.value for name, score in metrics.items()})
            means = [
                f"{name} {score.value:.3f}" for name, score in metrics.items() if score.task in ("mean", "heldout", "gsm8k")
            ]
            self.reporter.say(f"step {step}: {prefix}{', '.join(means)}")
            if self.run.config.evaluation.keep_best and not prefix:
                if on_main(partial(self._is_best, step, metrics)):
                    tokenizer = tokenizer_folder(self.run.config)
                    save_model(
                        state.chunks, self.folder / BEST_MODEL, tokenizer, self.provenance | {"step": step}, overwrite=True
                    )

    def _is_best(self, step: int, metrics: dict[str, Score]) -> bool:
        """Compare with the best so far and remember it; on the main rank.

        Raises:
            ConfigError: no such metric.
        """
        name = self.run.config.evaluation.keep_best
        assert name is not None
        if name not in metrics:
            raise ConfigError(f"evaluation.keep_best {name!r} was not measured; choose out of {', '.join(sorted(metrics))}")
        score, file = metrics[name], self.folder / BEST
        before = read_json(file) if file.is_file() and (self.folder / BEST_MODEL).is_dir() else None
        better = before is None or before["metric"] != name or _better(score, before["value"])
        if better:
            write_json(file, {"metric": name, "step": step, "value": score.value})
            self.reporter.say(f"step {step}: the best {name} so far, {score.value:.4g}; kept as {BEST_MODEL}")
        return better


def metric_name(score: Score) -> str:
    """SUITE/TASK/METRIC, with /LENGTH behind it where the score has one."""
    return "/".join([score.suite, score.task, score.metric, *([] if score.length is None else [str(score.length)])])


def _better(score: Score, before: float) -> bool:
    return score.value > before if score.higher_is_better else score.value < before


def suite_callbacks(
    run: Run, settings: SuiteSettings | None, reporter: Reporter, folder: Path, provenances: Sequence[dict[str, Any]]
) -> list[Callback]:
    """The callback of a run with suites, in a list; an empty one without."""
    return [] if settings is None else [SuiteEvaluation(run, settings, reporter, folder, provenances[0])]
