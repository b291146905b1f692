"""Selection on tiny real models. Oracle: hybrids made by `assemble_folder`, evaluated by whole forward passes."""

import itertools
import json
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_hylo.cli.console import show_selection
from megatron_hylo.cli.main import main
from megatron_hylo.config import ConfigError
from megatron_hylo.config.layouts import uniform_mixers
from megatron_hylo.config.upcycle import UpcycleConfig
from megatron_hylo.data.packed import PackedDataset
from megatron_hylo.eval.perplexity import HeldoutText, evaluate, evaluate_recall
from megatron_hylo.io import verify_manifest
from megatron_hylo.models.checkpoint import load_model, save_model
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.upcycle.run import assemble_folder, upcycle_folder
from megatron_hylo.upcycle.select import select_folder
from megatron_hylo.upcycle.select_losses import SwapEvaluation, SwapLoss, selection_windows
from megatron_hylo.upcycle.selection import smart_layers
from tests.conftest import tiny_config

LAYERS, LENGTH, TOKENS = 5, 16, 64
KL = 1e-5  # relative


@pytest.fixture(scope="module")
def material(one_rank, tmp_path_factory) -> SimpleNamespace:
    """A teacher with weights large enough to matter, pure students of it (as if aligned, and as if not), and text.

    The students differ from the teacher, and from one another, in what is copied too: it must come from the right one.
    """
    root = tmp_path_factory.mktemp("select")
    torch.manual_seed(0)
    teacher = build_model(tiny_config("*-" * LAYERS))
    with torch.no_grad():
        for name, p in teacher.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5)
            elif p.dim() == 2:
                p.normal_(std={"embedding": 0.5, "output_layer": 0.25}.get(name.split(".")[0], 0.1))
    save_model(teacher, root / "teacher")
    for name, symbol in (("mla", "+"), ("linear", "G"), ("mamba", "M")):
        upcycle_folder(UpcycleConfig(root / "teacher", root / f"{name}_made", pattern=symbol * LAYERS, init="paper"))
        pairs = dict(mla_rotary_pairs=[(0, 2, 4, 5 + layer % 3) for layer in range(LAYERS)]) if symbol == "+" else {}
        student = load_model(root / f"{name}_made", **pairs)  # as the calibrated start has them, other ones in each layer
        with torch.no_grad():
            for parameter in student.parameters():
                parameter *= 1 + 0.1 * torch.randn_like(parameter)
        save_model(student, root / f"{name}_untrained")
        save_model(student, root / name, provenance={"stage": "align"})
    (root / "data").mkdir()
    builder = IndexedDatasetBuilder(str(root / "data" / "train.bin"), dtype=np.uint16)
    generator = np.random.default_rng(0)
    for length in (40, 90, 31, 120):
        builder.add_document(generator.integers(0, 160, length).tolist(), [length])
    builder.finalize(str(root / "data" / "train.idx"))
    return SimpleNamespace(root=root, teacher=root / "teacher", mla=root / "mla", linear=root / "linear", data=root / "data")


@pytest.fixture(scope="module")
def assembled_kl(material):
    """Layers that are MLA -> KL of the assembled model folder, over the text `select` uses, by whole forward passes."""
    dataset = PackedDataset(material.data / "train", LENGTH, seed=0)
    windows = torch.stack([dataset[i] for i in range(TOKENS // LENGTH)])
    teacher, known = load_model(material.teacher), {}

    def kl(chosen) -> float:
        chosen = frozenset(chosen)
        if chosen not in known:
            pattern = "".join("+" if layer in chosen else "G" for layer in range(LAYERS))
            where = material.root / "assembled" / pattern
            assemble_folder(material.mla, material.linear, material.teacher, where, pattern)
            known[chosen] = evaluate(load_model(where), windows, teacher).kl
        return known[chosen]

    return kl


@pytest.fixture
def select(material):
    """select_folder with the material's folders; other arguments by name."""

    def run(count: int = 2, **changes):
        fields = dict(
            teacher=material.teacher, mla=material.mla, linear=material.linear, data=material.data, count=count,
            tokens=TOKENS + 3, sequence_length=LENGTH,
        )  # fmt: skip
        return select_folder(**(fields | changes))

    return run


def test_shared_prefixes_change_nothing_and_cost_only_the_layers_after(material, assembled_kl):
    dataset = PackedDataset(material.data / "train", LENGTH, seed=0)
    windows = torch.stack([dataset[i] for i in range(TOKENS // LENGTH)])
    evaluation = SwapEvaluation(*(load_model(f) for f in (material.teacher, material.mla, material.linear)), windows)
    assert evaluation.layer_evaluations == LAYERS
    for chosen, candidates in (((), range(LAYERS)), ((3,), [0, 1, 2, 4]), ((1, 4), [0, 1, 2]), ((0,), [3])):
        before = evaluation.layer_evaluations
        found = evaluation.losses_with_change(chosen, candidates, "")
        run = evaluation.layer_evaluations - before
        assert run == candidates[-1] + sum(LAYERS - layer for layer in candidates)
        for layer in candidates:
            assert found[layer] == evaluation.loss({*chosen} ^ {layer}, ""), (chosen, layer)  # bit for bit
            assert found[layer].kl == pytest.approx(assembled_kl({*chosen} ^ {layer}), rel=KL)
    assert evaluation.loss((), "") == SwapLoss(pytest.approx(assembled_kl(()), rel=KL), None)


def test_smart_equals_assembled_models(select, assembled_kl, material, tmp_path):
    found = select(2, output=tmp_path / "out")
    assert found.kl_all_linear == pytest.approx(assembled_kl(()), rel=KL)
    assert found.kl_by_layer == pytest.approx([assembled_kl({layer}) for layer in range(LAYERS)], rel=KL)
    gains = [found.kl_all_linear - kl for kl in found.kl_by_layer]
    assert max(gains) - min(gains) > 100 * KL  # the layers differ by more than what is compared
    assert tuple(found.mla_layers) == smart_layers(gains, 2)
    assert found.kl_selected == pytest.approx(assembled_kl(found.mla_layers), rel=KL)
    assert found.pattern == "".join("+" if layer in found.mla_layers else "G" for layer in range(LAYERS))
    assert found.tokens == TOKENS
    assert found.layer_evaluations == 3 * LAYERS + (LAYERS - 1) + LAYERS * (LAYERS + 1) // 2
    verify_manifest(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert written["pattern"] == found.pattern and written["kl_by_layer"] == found.kl_by_layer
    assert set(written) >= {"method", "by", "order", "mla_layers", "kl_all_linear", "kl_selected", "tokens", "seconds"}
    assert (tmp_path / "out" / "selection.png").read_bytes().startswith(b"\x89PNG")


def test_greedy_equals_brute_force_step_by_step(select, assembled_kl):
    found = select(3, method="greedy")
    chosen: set[int] = set()
    for _ in range(3):
        rest = [layer for layer in range(LAYERS) if layer not in chosen]
        chosen.add(min(rest, key=lambda layer: assembled_kl({*chosen, layer})))
    assert set(found.mla_layers) == chosen and found.mla_layers == sorted(chosen)
    assert set(found.order) == chosen and found.order[0] == min(range(LAYERS), key=lambda layer: assembled_kl({layer}))
    assert found.kl_selected == pytest.approx(assembled_kl(chosen), rel=KL)
    assert found.kl_by_layer == pytest.approx([assembled_kl({layer}) for layer in range(LAYERS)], rel=KL)
    one = select(1, method="greedy")
    assert one.mla_layers == [min(range(LAYERS), key=lambda layer: assembled_kl({layer}))] == select(1).mla_layers


def test_backward_equals_brute_force_step_by_step(select, assembled_kl, tmp_path):
    """From all MLA, each step makes linear the layer without which the KL stays smallest."""
    found = select(3, method="backward", output=tmp_path / "out")
    left, order = set(range(LAYERS)), []
    while len(left) > 3:
        order.append(min(sorted(left), key=lambda layer: assembled_kl(left - {layer})))
        left.remove(order[-1])
    assert found.order == order and set(found.mla_layers) == left
    assert found.kl_selected == pytest.approx(assembled_kl(left), rel=KL)
    assert found.kl_by_layer == pytest.approx([assembled_kl({*range(LAYERS)} - {layer}) for layer in range(LAYERS)], rel=KL)
    whole = assembled_kl(range(LAYERS))
    assert found.kl_all_mla == pytest.approx(whole, rel=KL)
    assert found.scores() == pytest.approx([kl - whole for kl in found.kl_by_layer], rel=1e-2, abs=1e-6)
    assert (tmp_path / "out" / "selection.png").is_file()


@pytest.fixture(scope="module")
def recall_data(tmp_path_factory):
    """A dataset with a tokenizer of characters, inside the tiny models' vocabulary."""
    folder = tmp_path_factory.mktemp("recall_data")
    characters = {"<unk>": 0} | {chr(c): i for i, c in enumerate((10, *range(32, 127)), 1)}
    tokenizer = Tokenizer(models.WordLevel(characters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder / "tokenizer")
    builder = IndexedDatasetBuilder(str(folder / "train.bin"), dtype=np.uint16)
    builder.add_document(np.random.default_rng(0).integers(1, 97, 4000).tolist(), [4000])
    builder.finalize(str(folder / "train.idx"))
    return folder


def test_recall_equals_assembled_models_losses_at_answers(select, material, recall_data, tmp_path, capsys):
    """Layer by layer, and as chosen; the answers' loss decides, or its sum with the KL, each as a part of the all-linear's."""
    tokens, length = 3600, 1800
    windows, answers = selection_windows(recall_data, tokens, length, "recall")
    assert answers.sum() > 20 and windows.shape == answers.shape == (2, length + 1)
    text, teacher = HeldoutText(windows, None, answers.int()), load_model(material.teacher)

    def losses(model) -> tuple[float, float]:
        return evaluate(model, windows, teacher).kl, evaluate_recall(model, text)["cross_entropy"]

    def assembled(chosen) -> tuple[float, float]:
        where = tmp_path / "assembled" / ("_".join(map(str, sorted(chosen))) or "none")
        if not where.exists():
            assemble_folder(
                material.mla, material.linear, material.teacher, where, "".join("+G"[i not in chosen] for i in range(LAYERS))
            )
        return losses(load_model(where))

    alone = [assembled({layer}) for layer in range(LAYERS)]
    none, answers_teacher = assembled(()), losses(teacher)[1]
    for by, loss in (("recall", lambda pair: pair[1]), ("both", lambda pair: pair[0] / none[0] + pair[1] / none[1])):
        found = select(1, by=by, data=recall_data, tokens=tokens, sequence_length=length, method="greedy")
        assert found.answers_by_layer == pytest.approx([pair[1] for pair in alone], rel=KL)
        assert found.kl_by_layer == pytest.approx([pair[0] for pair in alone], rel=KL)
        assert (found.kl_all_linear, found.answers_all_linear) == pytest.approx(none, rel=KL)
        assert found.answers_teacher == pytest.approx(answers_teacher, rel=KL)
        assert found.answer_tokens == answers[:, 1:].sum()
        best = min(range(LAYERS), key=lambda layer: loss(alone[layer]))
        assert found.order[0] == best and found.by == by
        assert found.scores() == pytest.approx([loss(none) - loss(pair) for pair in alone], rel=1e-3, abs=1e-6)
        assert (found.kl_selected, found.answers_selected) == pytest.approx(assembled(found.mla_layers), rel=KL)
        for ratio, (kl, answers_loss) in zip(found.recall_per_kl(), alone, strict=True):
            saved = none[0] - kl
            assert ratio is None if saved <= 0 else ratio == pytest.approx(min((none[1] - answers_loss) / saved, 50), rel=1e-2)
    show_selection(found)
    shown = capsys.readouterr().err
    assert f"{found.answers_by_layer[3]:.4f}" in shown and f"{found.answers_teacher:.4f} teacher" in shown
    with pytest.raises(ConfigError, match="holds no tokenizer, which --by recall needs"):
        select(2, by="recall")
    with pytest.raises(ConfigError, match="a fact and its question need 64"):
        select(2, by="recall", data=recall_data, tokens=200, sequence_length=100)


def test_uniform_asks_nothing_but_is_measured(select, assembled_kl, material, tmp_path):
    found = select(2, method="uniform", output=tmp_path / "out")
    assert found.pattern == uniform_mixers(LAYERS, 2)
    assert found.kl_by_layer is None and not (tmp_path / "out" / "selection.png").exists()
    assert found.kl_selected == pytest.approx(assembled_kl(found.mla_layers), rel=KL)
    mamba = select(2, method="uniform", linear=material.root / "mamba", allow_unaligned=True)
    assert mamba.pattern == found.pattern.replace("G", "M") and mamba.kl_selected != found.kl_selected


def test_tokens_are_whole_windows_of_what_there_is(select):
    assert select(1, method="uniform", tokens=2 * LENGTH - 1).tokens == LENGTH
    assert select(1, method="uniform", tokens=10_000).tokens == (40 + 90 + 31 + 120 - 1) // LENGTH * LENGTH


def test_models_that_were_not_aligned_are_refused_unless_asked_for(select, material, caplog, tmp_path):
    untrained = material.root / "linear_untrained"
    with pytest.raises(ConfigError, match="linear_untrained names no training stage.*--allow_unaligned"):
        select(linear=untrained)
    with pytest.raises(ConfigError, match="mla_untrained names no training stage"):
        select(mla=material.root / "mla_untrained")
    with caplog.at_level(logging.WARNING, "megatron_hylo.select"):
        allowed = select(linear=untrained, allow_unaligned=True)
    assert [r.getMessage() for r in caplog.records if r.name == "megatron_hylo.select"] == [
        f"{untrained} names no training stage in its hylo.json; choosing layers before alignment is known to pick bad ones"
    ]
    assert allowed.kl_by_layer == select().kl_by_layer

    model = load_model(material.linear)
    with torch.no_grad():
        for mixer, _ in model.mixer_layers():
            mixer.self_attention.out_proj.weight.normal_(std=20.0)
    save_model(model, tmp_path / "far", provenance={"stage": "align"})
    far = select(linear=tmp_path / "far", allow_unaligned=True)
    assert far.kl_all_linear > math.log(160) / 2
    with pytest.raises(ConfigError, match=r"far is \d.* nats from its teacher, more than half of ln\(160\)"):
        select(linear=tmp_path / "far")
    with torch.no_grad():
        model.mixer_layers()[1][0].self_attention.out_proj.weight.fill_(float("nan"))
    save_model(model, tmp_path / "nan", provenance={"stage": "align"})
    with pytest.raises(ConfigError, match="not finite"):
        select(linear=tmp_path / "nan", allow_unaligned=True)


def test_what_does_not_fit_is_refused_before_any_weight_is_read(select, material, tmp_path, monkeypatch):
    def save(name: str, pattern: str, **changes):
        save_model(build_model(tiny_config(pattern, **changes)), tmp_path / name, provenance={"stage": "align"})
        return tmp_path / name

    others = {
        "width": save("width", "G-" * LAYERS, hidden_size=64),
        "depth": save("depth", "G-" * 3),
        "words": save("words", "*-" * LAYERS, vocab_size=96),
    }
    monkeypatch.setattr("megatron_hylo.upcycle.select.load_model", None)
    for change, message in (
        (dict(count=0), "between 1 and 4, got 0"),
        (dict(count=LAYERS), "between 1 and 4, got 5"),
        (dict(mla=material.linear), "GGGGG and GGGGG; make them with"),
        (dict(linear=material.mla), r"\+{5} and \+{5}"),
        (dict(linear=others["width"]), "hidden_size is 64"),
        (dict(linear=others["depth"]), "num_hidden_layers is 3"),
        (dict(teacher=others["words"]), "vocab_size is 96"),
        (dict(data=tmp_path / "nothing"), "there is no dataset"),
        (dict(tokens=LENGTH - 1), "tokens 15 is less than one window of sequence_length 16"),
        (dict(output=material.data), "already exists"),
        (dict(teacher=tmp_path / "nothing"), "not a megatron_hylo model folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            select(**change)


def test_text_of_another_vocabulary_is_refused(select, tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "train.bin"), dtype=np.uint16)
    builder.add_document([161] * 100, [100])
    builder.finalize(str(tmp_path / "train.idx"))
    with pytest.raises(ConfigError, match="holds token id 161, the vocabulary of .*teacher has 160"):
        select(data=tmp_path)


def test_the_command_prints_the_pattern_last_and_refuses_in_one_sentence(select, material, tmp_path, capsys):
    def run(*arguments) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in ("select", material.teacher, "--mla", material.mla, "--data", material.data, *arguments)])
        captured = capsys.readouterr()
        return stopped.value.code, captured.err + captured.out

    sizes = ("--tokens", TOKENS, "--sequence_length", LENGTH, "--count", 2)
    for method, count in itertools.product(("smart", "greedy"), (2,)):
        out = tmp_path / method
        code, text = run("--linear", material.linear, *sizes, "--method", method, "--output", out)
        expected = select(count, method=method)
        assert code == 0 and text.splitlines()[-1] == expected.pattern
        assert f"{expected.kl_selected:.4f} as chosen" in text and "64 tokens" in text
        assert json.loads((out / "selection.json").read_text())["mla_layers"] == expected.mla_layers
    code, text = run("--linear", material.root / "linear_untrained", *sizes)
    assert code == 2 and "before alignment" in text and "Traceback" not in text
