"""Layer selection at the level of model folders: measure hybrids of two aligned pure models, choose, record.

A hybrid is what `assemble` makes: embedding, final norm and head of the teacher, each layer whole from the all-MLA or
the all-linear model. Measuring one costs only its layers from the first that differs from what was run before, and the
head a chunk of tokens at a time.
"""

import logging
import math
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_hylo.config import ConfigError
from megatron_hylo.config.layouts import uniform_mixers
from megatron_hylo.config.mixers import LINEAR_SYMBOLS, MLA_SYMBOL
from megatron_hylo.data.packed import PackedDataset
from megatron_hylo.data.tokenizer import check_dataset, check_ids
from megatron_hylo.distill.alignment import mixer_output, mlp_layer
from megatron_hylo.distill.head_loss import linear_head_loss
from megatron_hylo.io import atomic_directory, check_free, write_json
from megatron_hylo.io.progress import Track, no_progress
from megatron_hylo.models.checkpoint import load_model, read_description
from megatron_hylo.models.hylo_model import HyloModel
from megatron_hylo.platform.distributed import device, is_main
from megatron_hylo.upcycle.assemble import Source, assemble_state
from megatron_hylo.upcycle.selection import check_count, greedy_layers, smart_layers

logger = logging.getLogger("megatron_hylo.select")
Method = Literal["smart", "greedy", "uniform"]


@dataclass(frozen=True)
class Selection:
    """Chosen layers and the reason. KL is KL(teacher || model) in nats a token."""

    method: str
    pattern: str  # one mixer a layer, for `hylo assemble --pattern`
    mla_layers: list[int]
    kl_all_linear: float
    kl_by_layer: list[float] | None  # with that layer alone MLA; None for uniform, which does not ask
    kl_selected: float
    tokens: int
    layer_evaluations: float  # layers run over all tokens, the teacher's included
    seconds: float


class SwapEvaluation:
    """KL to the teacher of the hybrids that two pure models can make, over fixed text.

    Args:
        teacher: gives embedding, final norm and head; runs once, its final hidden states are kept.
        mla, linear: layers to choose from; the same dtype as the teacher.
        windows: int64 [n, sequence].
        track: progress display over an iterable.
    """

    @torch.no_grad()
    def __init__(
        self, teacher: HyloModel, mla: HyloModel, linear: HyloModel, windows: Tensor, track: Track = no_progress
    ) -> None:
        self.teacher, self.track = teacher, track
        self.mla, self.linear = mla.mixer_layers(), linear.mixer_layers()
        self.depth = len(self.linear)
        self.windows = [window.unsqueeze(0).to(device()) for window in windows]
        self.targets = [teacher(window) for window in track(self.windows, "teacher")]
        self.layers_run = self.depth * len(self.windows)

    @property
    def layer_evaluations(self) -> float:
        """Layers run so far, each over all tokens."""
        return self.layers_run / len(self.windows)

    @torch.no_grad()
    def kl(self, chosen: Collection[int], description: str) -> float:
        """KL with the layers of `chosen` MLA and all others linear."""
        pairs = list(zip(self.windows, self.targets))
        return sum(
            self._kl(self._run(self._embed(window), chosen, 0, self.depth), target)
            for window, target in self.track(pairs, description)
        ) / len(pairs)

    @torch.no_grad()
    def kl_with(self, chosen: Collection[int], candidates: Sequence[int], description: str) -> dict[int, float]:
        """KL with each candidate MLA beside `chosen`; layers before the candidate run once for all.

        Args:
            chosen: layers that are MLA in any case.
            candidates: layer indices, ascending.
            description: of the progress display.
        """
        sums, place, hidden = dict.fromkeys(candidates, 0.0), 0, torch.empty(0)
        work = [(number, candidate) for number in range(len(self.windows)) for candidate in candidates]
        for number, candidate in self.track(work, description):
            if candidate == candidates[0]:
                place, hidden = 0, self._embed(self.windows[number])
            hidden, place = self._run(hidden, chosen, place, candidate), candidate
            final = self._run(hidden, {*chosen, candidate}, candidate, self.depth)
            sums[candidate] += self._kl(final, self.targets[number])
        return {candidate: total / len(self.windows) for candidate, total in sums.items()}

    def _embed(self, window: Tensor) -> Tensor:
        return self.teacher.embedding(input_ids=window, position_ids=None)

    def _run(self, hidden: Tensor, chosen: Collection[int], start: int, stop: int) -> Tensor:
        """Layers start..stop - 1: [sequence, 1, hidden] -> the same."""
        for index in range(start, stop):
            mixer, mlp = (self.mla if index in chosen else self.linear)[index]
            hidden = mlp_layer(mlp, hidden + mixer_output(mixer, hidden))
        self.layers_run += stop - start
        return hidden

    def _kl(self, hidden: Tensor, target: Tensor) -> float:
        weight = self.teacher.head_weight()
        final = self.teacher.decoder.final_norm(hidden).flatten(0, 1)
        kl = linear_head_loss(final, weight, teacher_hidden=target.flatten(0, 1), teacher_weight=weight).kl
        assert kl is not None, "there is a teacher"
        if not math.isfinite(kl.item()):
            raise ConfigError("KL to the teacher is not finite: weights are broken, align the models again")
        return kl.item()


def select_folder(
    teacher: str | Path,
    mla: str | Path,
    linear: str | Path,
    data: str | Path,
    count: int,
    method: Method = "smart",
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
        method: `smart` (Zebra-Llama's SMART), `greedy` or `uniform` (evenly spread, nothing asked).
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
    windows = _windows(data, tokens, sequence_length)
    check_ids(windows, vocabulary, data, teacher)
    for folder in (teacher, mla, linear):
        check_dataset(data, folder)
    base = load_model(teacher).eval()
    pure_mla, pure_linear = (load_model(folder, params_dtype=base.config.params_dtype).eval() for folder in (mla, linear))
    evaluation = SwapEvaluation(base, pure_mla, pure_linear, windows, track)
    kl_all_linear = evaluation.kl((), "all linear")
    if kl_all_linear > math.log(vocabulary) / 2:
        _doubt(
            f"{linear} is {kl_all_linear:.2f} nats from its teacher, more than half of ln({vocabulary}), a blind guess's",
            allow_unaligned,
        )
    depth, kl_by_layer = evaluation.depth, None
    if method == "uniform":
        chosen = tuple(layer for layer, mixer in enumerate(uniform_mixers(depth, count)) if mixer == MLA_SYMBOL)
    elif method == "smart":
        kl = evaluation.kl_with((), range(depth), "one layer MLA")
        kl_by_layer = list(kl.values())
        chosen = smart_layers([kl_all_linear - value for value in kl_by_layer], count)
    else:
        rounds: list[dict[int, float]] = []

        def measure(so_far: tuple[int, ...], candidates: list[int]) -> dict[int, float]:
            rounds.append(evaluation.kl_with(so_far, candidates, f"MLA layer {len(so_far) + 1} of {count}"))
            return rounds[-1]

        path = greedy_layers(depth, count, measure)
        kl_by_layer, chosen, kl_selected = list(rounds[0].values()), tuple(sorted(layer for layer, _ in path)), path[-1][1]
    if method != "greedy":
        kl_selected = evaluation.kl(chosen, "chosen")
    selection = Selection(
        method=method,
        pattern="".join(MLA_SYMBOL if layer in chosen else symbol for layer in range(depth)),
        mla_layers=list(chosen),
        kl_all_linear=kl_all_linear,
        kl_by_layer=kl_by_layer,
        kl_selected=kl_selected,
        tokens=windows.numel(),
        layer_evaluations=evaluation.layer_evaluations,
        seconds=time.perf_counter() - start,
    )
    if output is not None:
        with atomic_directory(output, overwrite) as folder:
            if is_main():
                write_json(folder / "selection.json", asdict(selection))
                if kl_by_layer is not None:
                    plot_selection(selection, folder / "selection.png")
    return selection


def plot_selection(selection: Selection, file: Path) -> None:
    """Bars of each layer's sensitivity, the chosen ones marked, as PNG."""
    from megatron_hylo.eval.plots import Axes, Theme, draw_png

    assert selection.kl_by_layer is not None, "every method but uniform measures the layers one by one"
    gains = [selection.kl_all_linear - kl for kl in selection.kl_by_layer]

    def draw(axes: Axes, theme: Theme) -> None:
        linear = selection.pattern.replace("+", "")[0]
        for label, color, wanted in (("MLA", theme.series[1], True), (linear, theme.series[0], False)):
            layers = [layer for layer in range(len(gains)) if (layer in selection.mla_layers) == wanted]
            axes.bar(layers, [gains[layer] for layer in layers], color=color, label=label)
        axes.axhline(0, color=theme.ink, linewidth=0.8)
        axes.set(xlabel="layer", ylabel="KL lost when it alone is MLA, nats a token", xticks=range(len(gains)))
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
    assemble_state(of_mla, of_linear, of_teacher, target)
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


def _windows(data: str | Path, tokens: int, sequence_length: int) -> Tensor:
    """Inputs, int64 [n, sequence_length], of the first windows of the training set in a shuffled order."""
    if tokens < sequence_length:
        raise ConfigError(f"tokens {tokens} is less than one window of sequence_length {sequence_length}; give more, or less")
    dataset = PackedDataset(f"{data}/train", sequence_length, seed=0)
    return torch.stack([dataset[i][:-1] for i in range(min(tokens // sequence_length, dataset.windows_per_epoch))])
