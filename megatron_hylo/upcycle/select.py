"""Layer selection at the level of model folders: measure hybrids of two aligned pure models, choose, record.

A hybrid is what `assemble` makes: embedding, final norm and head of the teacher, each layer whole from the all-MLA or
the all-linear model. Measuring one costs only its layers from the first that differs from what was run before, and the
head a chunk of tokens at a time.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.config.layouts import uniform_mixers
from megatron_hylo.config.mixers import LINEAR_SYMBOLS, MLA_SYMBOL
from megatron_hylo.data.tokenizer import check_dataset, check_ids
from megatron_hylo.io import atomic_directory, check_free, write_json
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.models.checkpoint import load_model
from megatron_hylo.models.description import read_description
from megatron_hylo.platform.distributed import is_main
from megatron_hylo.upcycle.assemble import Source, assembled
from megatron_hylo.upcycle.select_losses import By, SwapEvaluation, SwapLoss, selection_windows
from megatron_hylo.upcycle.selection import backward_layers, check_count, greedy_layers, smart_layers

logger = logging.getLogger("megatron_hylo.select")
MOST_RATIO = 50.0  # HypeNet's cap
Method = Literal["smart", "greedy", "backward", "uniform"]


@dataclass(frozen=True)
class Selection:
    """Chosen layers and the reason.

    Args:
        method, by: how they were chosen, and by which loss.
        pattern: one mixer a layer, for `hylo assemble --pattern`.
        mla_layers: the chosen ones, ascending.
        order: as they were chosen (greedy) or the others as they were given up (backward), so that one run tells what fewer or
            more MLA layers would be; None for the other methods.
        kl_all_linear, kl_all_mla, kl_selected: KL(teacher || model) in nats a token, of the text with exercises in it unless
            chosen by kl; all MLA for backward alone.
        kl_by_layer: with that layer alone MLA (backward: alone linear); None for uniform, which does not ask.
        answers_teacher, answers_all_linear, answers_all_mla, answers_selected, answers_by_layer: cross-entropy at the answers
            of recall exercises, in nats a token; None where chosen by kl.
        tokens, answer_tokens: of the text, and of the answers in it.
        layer_evaluations: layers run over all tokens, the teacher's included.
        seconds: of the whole.
    """

    method: str
    by: By
    pattern: str
    mla_layers: list[int]
    order: list[int] | None
    kl_all_linear: float
    kl_all_mla: float | None
    kl_by_layer: list[float] | None
    kl_selected: float
    answers_teacher: float | None
    answers_all_linear: float | None
    answers_all_mla: float | None
    answers_by_layer: list[float] | None
    answers_selected: float | None
    tokens: int
    answer_tokens: int
    layer_evaluations: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and `recall_per_kl` for JSON."""
        return asdict(self) | {"recall_per_kl": self.recall_per_kl()}

    def scores(self) -> list[float] | None:
        """Return the loss that each layer saves as the only MLA layer, or costs as the only linear one (backward)."""
        if self.kl_by_layer is None:
            return None
        reference = SwapLoss(self.kl_all_linear, self.answers_all_linear)
        start = reference if self.kl_all_mla is None else SwapLoss(self.kl_all_mla, self.answers_all_mla)
        answers: Sequence[float | None] = self.answers_by_layer or [None] * len(self.kl_by_layer)
        sign = 1 if self.kl_all_mla is None else -1
        return [
            sign * (start.by(self.by, reference) - SwapLoss(kl, loss).by(self.by, reference))
            for kl, loss in zip(self.kl_by_layer, answers)
        ]

    def recall_per_kl(self) -> list[float | None] | None:
        """Nats at the answers for each nat of KL that a layer makes, as HypeNet's recall-against-commonsense score.

        At most MOST_RATIO; None for a layer that makes the KL no better. None without recall.
        """
        if self.kl_by_layer is None or self.answers_by_layer is None:
            return None
        alone_mla = self.kl_all_mla is None
        kl, answers = (self.kl_all_linear, self.answers_all_linear) if alone_mla else (self.kl_all_mla, self.answers_all_mla)
        assert kl is not None and answers is not None, "measured with the layers"
        sign = 1 if alone_mla else -1
        changes = [(sign * (kl - k), sign * (answers - a)) for k, a in zip(self.kl_by_layer, self.answers_by_layer)]
        return [min(at_answers / of_kl, MOST_RATIO) if of_kl > 0 else None for of_kl, at_answers in changes]


def select_folder(
    teacher: str | Path,
    mla: str | Path,
    linear: str | Path,
    data: str | Path,
    count: int,
    method: Method = "smart",
    by: By = "kl",
    tokens: int = 65_536,
    sequence_length: int = 2048,
    output: str | Path | None = None,
    allow_unaligned: bool = False,
    overwrite: bool = False,
    track: Track = no_progress,
) -> Selection:
    """Choose which `count` layers are MLA; `platform.initialize` must have run, without parallel groups.

    Args:
        teacher: model folder both pure models were made from and aligned with.
        mla: aligned model folder, all layers MLA.
        linear: aligned model folder, the same linear mixer in all layers.
        data: dataset folder; the text is the training set's, so that held-out text stays unseen.
        count: number of MLA layers.
        method: `smart` (Zebra-Llama's SMART), `greedy` (from all linear, the best one more), `backward` (from all MLA, the
            least needed one less) or `uniform` (evenly spread, nothing asked).
        by: `kl` (to the teacher), `recall` (loss at the answers of key-value exercises in the text) or `both` (the sum of the
            two, each as a part of the all-linear model's).
        tokens: text to measure on; rounded down to whole windows, and to what there is.
        sequence_length: tokens a window.
        output: folder to make, with selection.json and (but for uniform) selection.png.
        allow_unaligned: go on, with a warning, where the models do not look aligned.
        overwrite: replace what is at `output`.
        track: progress display over an iterable.

    Raises:
        ConfigError: models that cannot be assembled, a count or number of tokens out of range, no data, an output that
            exists, or models that do not look aligned.
    """
    start = time.perf_counter()
    if output is not None:
        check_free(output, overwrite, [teacher, mla, linear, data])
    symbol, vocabulary = _check_models(teacher, mla, linear, count, allow_unaligned)
    windows, answers = selection_windows(data, tokens, sequence_length, by)
    check_ids(windows, vocabulary, data, teacher)
    for folder in (teacher, mla, linear):
        check_dataset(data, folder)
    base = load_model(teacher).eval()
    pure_mla, pure_linear = (load_model(folder, params_dtype=base.config.params_dtype).eval() for folder in (mla, linear))
    evaluation = SwapEvaluation(base, pure_mla, pure_linear, windows, answers, track)
    all_linear = evaluation.loss((), "all linear")
    if all_linear.kl > math.log(vocabulary) / 2:
        _doubt(
            f"{linear} is {all_linear.kl:.2f} nats from its teacher, more than half of ln({vocabulary}), a blind guess's",
            allow_unaligned,
        )
    depth = evaluation.depth
    all_mla = evaluation.loss(range(depth), "all MLA") if method == "backward" else None
    by_layer: dict[int, SwapLoss] | None = None
    order: list[int] | None = None
    if method == "uniform":
        chosen = tuple(layer for layer, mixer in enumerate(uniform_mixers(depth, count)) if mixer == MLA_SYMBOL)
    elif method == "smart":
        by_layer = evaluation.losses_with_change((), range(depth), "one layer MLA")
        whole = all_linear.by(by, all_linear)
        chosen = smart_layers([whole - loss.by(by, all_linear) for loss in by_layer.values()], count)
    else:
        rounds: list[dict[int, SwapLoss]] = []

        def measure(mla_layers: tuple[int, ...], candidates: list[int]) -> dict[int, float]:
            """Measure one step: the loss with each candidate changed, by layer, in the units of `by`."""
            step = f"step {len(rounds) + 1} of {count if method == 'greedy' else depth - count}"
            rounds.append(evaluation.losses_with_change(mla_layers, candidates, step))
            return {layer: loss.by(by, all_linear) for layer, loss in rounds[-1].items()}

        order = (greedy_layers if method == "greedy" else backward_layers)(depth, count, measure)
        by_layer = rounds[0]
        chosen = tuple(sorted(order if method == "greedy" else set(range(depth)) - set(order)))
    selected = rounds[-1][order[-1]] if order is not None else evaluation.loss(chosen, "chosen")
    selection = Selection(
        method=method,
        by=by,
        pattern="".join(MLA_SYMBOL if layer in chosen else symbol for layer in range(depth)),
        mla_layers=list(chosen),
        order=order,
        kl_all_linear=all_linear.kl,
        kl_all_mla=all_mla.kl if all_mla else None,
        kl_by_layer=[loss.kl for loss in by_layer.values()] if by_layer else None,
        kl_selected=selected.kl,
        answers_teacher=evaluation.teacher_loss().answers,
        answers_all_linear=all_linear.answers,
        answers_all_mla=all_mla.answers if all_mla else None,
        answers_by_layer=[loss.answers for loss in by_layer.values() if loss.answers is not None]
        if by_layer and answers is not None
        else None,
        answers_selected=selected.answers,
        tokens=windows[:, 1:].numel(),
        answer_tokens=evaluation.answer_tokens,
        layer_evaluations=evaluation.layer_evaluations,
        seconds=time.perf_counter() - start,
    )
    if output is not None:
        with atomic_directory(output, overwrite) as folder:
            if is_main():
                write_json(folder / "selection.json", selection.to_dict())
                if by_layer is not None:
                    plot_selection(selection, folder / "selection.png")
    return selection


def plot_selection(selection: Selection, file: Path) -> None:
    """Bars of each layer's sensitivity, the chosen ones marked, as PNG."""
    from megatron_hylo.eval.plots import Axes, Theme, draw_png

    gains = selection.scores()
    assert gains is not None, "every method but uniform measures the layers one by one"
    loss = {
        "kl": "KL, nats a token",
        "recall": "answers' loss, nats a token",
        "both": "KL + answers' loss, parts of all-linear",
    }
    change = "lost by it alone as linear" if selection.method == "backward" else "saved by it alone as MLA"

    def draw(axes: Axes, theme: Theme) -> None:
        """Draw each layer's gain as a bar, in the colour of what it becomes."""
        linear = selection.pattern.replace("+", "")[0]
        for label, color, wanted in (("MLA", theme.series[1], True), (linear, theme.series[0], False)):
            layers = [layer for layer in range(len(gains)) if (layer in selection.mla_layers) == wanted]
            axes.bar(layers, [gains[layer] for layer in layers], color=color, label=label)
        axes.axhline(0, color=theme.ink, linewidth=0.8)
        axes.set(xlabel="layer", ylabel=f"{loss[selection.by]}, {change}", xticks=range(len(gains)))
        axes.set_title(
            f"{selection.method}, {selection.tokens:,} tokens: KL {selection.kl_all_linear:.3f} all linear, "
            f"{selection.kl_selected:.3f} with {len(selection.mla_layers)} MLA layers"
        )
        axes.legend()

    draw_png(file, draw, size=(10, 4))


def _check_models(
    teacher: str | Path, mla: str | Path, linear: str | Path, count: int, allow_unaligned: bool
) -> tuple[str, int]:
    """(symbol of the linear layers, vocabulary); refuses what cannot be assembled, before any weight is read."""
    (teacher_config, _), (mla_config, mla_from), (linear_config, linear_from) = map(read_description, (teacher, mla, linear))
    pure = set(mla_config.mixers) == {MLA_SYMBOL} and len(set(linear_config.mixers)) == 1
    if not pure or linear_config.mixers[0] not in LINEAR_SYMBOLS:
        raise ConfigError(
            f"select needs a model of MLA layers alone and one of a single linear mixer ({' '.join(LINEAR_SYMBOLS)}), got "
            f"{mla_config.mixers} and {linear_config.mixers}; make them with `hylo upcycle --pattern`"
        )
    check_count(count, mla_config.num_hidden_layers)
    symbol = linear_config.mixers[0]
    target = mla_config.with_mixers(MLA_SYMBOL + symbol * (mla_config.num_hidden_layers - 1))
    # its checks are made at once; no tensor is asked for
    of_mla, of_linear, of_teacher = (Source(config, _unread) for config in (mla_config, linear_config, teacher_config))
    assembled(of_mla, of_linear, of_teacher, target)
    for folder, description in ((mla, mla_from), (linear, linear_from)):
        if "stage" not in description["provenance"]:
            _doubt(f"{folder} names no training stage in its hylo.json", allow_unaligned)
    return symbol, teacher_config.vocab_size


def _unread(name: str) -> Tensor:
    raise AssertionError(f"{name} is read where only configurations are compared")


def _doubt(reason: str, allow_unaligned: bool) -> None:
    message = f"{reason}; choosing layers before alignment is known to pick bad ones"
    if not allow_unaligned:
        raise ConfigError(f"{message}: run `hylo train` with stage align first, or give --allow_unaligned")
    logger.warning(message)
