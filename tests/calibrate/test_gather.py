"""`calibrate` against transformers in float64, its resumption, and what `CalibrationFolder` refuses."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from safetensors.torch import load_file

from megatron_hylo.calibrate import gather, solve
from megatron_hylo.calibrate.statistics import CalibrationFolder, layer_file
from megatron_hylo.config import ConfigError, ParallelConfig
from megatron_hylo.convert.to_hf import convert_megatron_to_hf
from megatron_hylo.data.packed import PackedDataset
from megatron_hylo.io import DamagedError, verify_manifest
from tests.calibrate import worker
from tests.calibrate.conftest import SETTINGS
from tests.forked import run_ranks
from tests.kernels.compare import relative_error

LAYERS, HEADS, GROUPS, DIM = 3, 6, 2, 16
FP32 = 1e-5
SIZES = dict(kv_lora_rank=20, q_lora_rank=48, qk_pos_emb_head_dim=12, linear_num_heads=6, linear_key_head_dim=16,
             linear_value_head_dim=16, mamba_num_heads=6)  # fmt: skip


def transformers_statistics(folder: Path, ids: torch.Tensor, layer: int, near: int) -> dict[str, torch.Tensor]:
    """The definitions of `calibrate/statistics.py`, from hooks and attention probabilities of transformers' float64 model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    attention, found = model.model.layers[layer].self_attn, {}
    watched = {"x": model.model.layers[layer].input_layernorm, "q": attention.q_norm, "k": attention.k_norm,
               "v": attention.v_proj, "a": attention.o_proj}  # fmt: skip
    for name, module in watched.items():
        module.register_forward_hook(lambda _, __, out, name=name: found.update({name: out.detach()}))
    with torch.no_grad():
        p = model(ids, output_attentions=True).attentions[layer]  # [windows, heads, queries, keys]
    x, q, k = found["x"], found["q"].flatten(0, 1), found["k"].flatten(0, 1)
    v = found["v"].unflatten(-1, (GROUPS, DIM))
    rows = x.flatten(0, 1)
    made = {
        "input_mean": rows.mean(0),
        "input_second_moment": rows.T @ rows / len(rows),
        "query_second_moment": torch.stack([q[:, h].T @ q[:, h] / len(q) for h in range(HEADS)]),
        "key_second_moment": torch.stack([k[:, g].T @ k[:, g] / len(k) for g in range(GROUPS)]),
        "output_energy": found["a"].square().sum(-1).mean(),
    }
    lists = {
        name: []
        for name in ("head_energy", "attention_distance", "attention_entropy", "sink_mass", "length_moment", "reception_moment")
    }
    for h in range(HEADS):
        length = (p[:, h] @ v[:, :, h // 3]).norm(dim=-1)
        received = torch.zeros_like(length)
        distance = mass = 0.0
        for t in range(p.shape[2]):
            first = max(0, t - near + 1)
            local = p[:, h, t, first : t + 1]
            received[:, first : t + 1] += local / local.sum(-1, keepdim=True)
            for s in range(1, t + 1):
                distance, mass = distance + float(p[:, h, t, s].sum()) * (t - s), mass + float(p[:, h, t, s].sum())
        logs = received.clamp(1e-2, 20).log()
        lists["head_energy"].append(length.square().mean())
        lists["attention_distance"].append(torch.tensor(distance / mass))
        positive = p[:, h].clamp(min=1e-300)
        lists["attention_entropy"].append(-(positive * positive.log()).sum(-1).mean())
        lists["sink_mass"].append(p[:, h, :, 0].mean())
        lists["length_moment"].append(((length / length.mean())[..., None] * x).mean((0, 1)))
        lists["reception_moment"].append(((logs - logs.mean())[..., None] * x).mean((0, 1)))
    return made | {name: torch.stack(values) for name, values in lists.items()}


@pytest.fixture(scope="module")
def hugging_face(material) -> Path:
    convert_megatron_to_hf(material.teacher, material.root / "hf")
    return material.root / "hf"


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("pieces", [False, True], ids=["whole windows", "queries in pieces"])
def test_statistics_equal_transformers_in_float64(pieces, layer, material, hugging_face, tmp_path, monkeypatch):
    folder = material.done
    if pieces:  # 16 + 16 + 8 queries; keys receive attention from two of them
        monkeypatch.setattr(gather, "LOOK_BACK_TOKENS", 16)
        monkeypatch.setattr(gather, "RECEPTION_TOKENS", 7)
        folder = tmp_path / "pieces"
        gather.calibrate(material.teacher, material.data, folder, **SETTINGS)
    windows = torch.stack([PackedDataset(material.data / "train", 40, 1234)[i] for i in range(24)])
    expected = transformers_statistics(hugging_face, windows[:, :-1], layer, 7 if pieces else 32)
    found = CalibrationFolder(folder, material.teacher)[layer]
    assert int(found.pop("layer")) == layer and int(found.pop("tokens")) == 960
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < FP32, errors


def test_folder_holds_the_windows_that_were_measured(material):
    calibration, heldout = CalibrationFolder(material.done, material.teacher).windows()
    dataset = PackedDataset(material.data / "train", 40, 1234)
    assert torch.equal(calibration, torch.stack([dataset[i] for i in range(24)]))
    assert heldout.shape == (4, 41) and heldout.dtype == torch.int64
    text = {tuple(row) for row in calibration.tolist()}
    assert not text & {tuple(row) for row in heldout.tolist()}


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_interrupted_calibration_goes_on_where_it_was(material, tmp_path, monkeypatch):
    measured, means = [], gather.LayerSums.means

    def interrupted(self, layer):
        if layer == 1 and measured == [0]:
            raise KeyboardInterrupt
        measured.append(layer)
        return means(self, layer)

    monkeypatch.setattr(gather.LayerSums, "means", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gather.calibrate(material.teacher, material.data, tmp_path / "made", **SETTINGS)
    assert not (tmp_path / "made").exists()
    measured.append("again")
    gather.calibrate(material.teacher, material.data, tmp_path / "made", **SETTINGS)
    assert measured == [0, "again", 1, 2]
    assert files(tmp_path / "made") == files(material.done)
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_layers_of_other_settings_are_not_reused(material, tmp_path, monkeypatch):
    means, measured = gather.LayerSums.means, []

    def once(self, layer):
        measured.append(layer)
        if measured == [0, 1]:
            raise KeyboardInterrupt
        return means(self, layer)

    monkeypatch.setattr(gather.LayerSums, "means", once)
    with pytest.raises(KeyboardInterrupt):
        gather.calibrate(material.other, material.data, tmp_path / "made", **SETTINGS)
    gather.calibrate(material.teacher, material.data, tmp_path / "made", **SETTINGS)
    assert measured == [0, 1, 0, 1, 2]
    assert files(tmp_path / "made") == files(material.done)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(tokens=10**6), r"has \d+ windows of 40 tokens, 1000000 calibration tokens need 25000; .*at most \d+ tokens"),
        (dict(tokens=120), "layer 0: 120 calibration tokens are too few for 48 channels; give at least 192"),
        (
            dict(parallel=ParallelConfig(pipeline_model_parallel_size=2)),
            "calibrate works with .* alone, got pipeline_model_parallel_size 2; leave",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message, material, tmp_path):
    with pytest.raises(ConfigError, match=message):
        gather.calibrate(material.teacher, material.data, tmp_path / "made", **(SETTINGS | changes))
    assert not (tmp_path / "made").exists()


def test_a_finished_folder_is_not_replaced_unasked(material):
    with pytest.raises(ConfigError, match="already exists"):
        gather.calibrate(material.teacher, material.data, material.done, **SETTINGS)


def test_folder_belongs_to_one_checkpoint(material):
    folder = CalibrationFolder(material.done, material.teacher)
    assert list(folder) == [0, 1, 2] and folder.get(3) is None and folder.get(-1) is None
    with pytest.raises(ConfigError, match="another checkpoint than .*other"):
        CalibrationFolder(material.done, material.other)
    with pytest.raises(ConfigError, match="not a calibration folder"):
        CalibrationFolder(material.teacher, material.teacher)


def test_damaged_folder_is_refused(material, tmp_path):
    shutil.copytree(material.done, tmp_path / "copy")
    file = tmp_path / "copy" / layer_file(1)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedError, match=layer_file(1)):
        CalibrationFolder(tmp_path / "copy", material.teacher)


def write_long_text(folder: Path) -> None:
    """Random tokens, a document a split."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split in ("train", "heldout"):
        builder = IndexedDatasetBuilder(str(folder / f"{split}.bin"), dtype=np.uint16)
        builder.add_document(generator.integers(0, 160, 300).tolist(), [300])
        builder.finalize(str(folder / f"{split}.idx"))


@pytest.fixture
def by_one_rank(material, tmp_path, monkeypatch):
    """(name, settings) -> what makes a hybrid at NAME; one rank makes it at NAME_one, and the first layer at NAME."""

    def make(name: str, **settings) -> dict:
        common = dict(teacher=str(material.teacher), pattern="+GM", overrides=SIZES) | settings
        worker.upcycle(common | {"output": str(tmp_path / f"{name}_one")})
        if "calibration" in common:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(solve, "_match_norm", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))  # of the last layer
                worker.upcycle(common | {"output": str(tmp_path / name)})
            for file in (tmp_path / f".{name}.layers").glob("*_00001*"):
                file.unlink()
            assert (tmp_path / f".{name}.layers" / "layer_00000.json").is_file()
        return common | {"output": str(tmp_path / name)}

    return make


def sums_by_hand() -> list[list[torch.Tensor]]:
    """Normal equations of what is solved on, and of what is held out: of each eighth micro-batch, then of these."""
    made, found = worker.uneven_micro_batches(), []
    for wanted in (False, True):
        total = [torch.zeros(shape, dtype=torch.float64) for shape in ((5, 5), (5, 3), (5, 3), ())]
        for group in range(8):
            part = [torch.zeros_like(t) for t in total]
            for is_held, values in made[group::8]:
                f, own, taught, studied = (value.flatten(0, 1) for value in values)
                rows = f.T @ f, f.T @ own, f.T @ (taught - studied), (own + (taught - studied)).double().square().sum()
                part = [t + row for t, row in zip(part, rows)] if is_held == wanted else part
            total = [t + p for t, p in zip(total, part)]
        found.append(total)
    return found


@pytest.mark.multirank
def test_parallel_ranks_make_what_one_rank_does(material, tmp_path, by_one_rank):
    """Statistics within rounding, and hybrids to the last bit, also where one rank began and two went on."""
    parallelisms = {"tp2": {"tensor_model_parallel_size": 2}, "dp2": {}}
    arguments = dict(teacher=str(material.teacher), data=str(material.data), **SETTINGS)
    jobs = [("calibrate", groups, arguments | {"output": str(tmp_path / name)}) for name, groups in parallelisms.items()]
    # one window for two ranks; held-out text long enough for it
    few = arguments | {"tokens": 256, "sequence_length": 256, "output": str(tmp_path / "few"), "data": str(tmp_path / "long")}
    write_long_text(tmp_path / "long")
    jobs.append(("calibrate", {}, few))
    gather.calibrate(**few | {"output": tmp_path / "few_of_one"})
    calibrated = dict(calibration=str(material.done), shapes="teacher")
    hybrids = {
        "sequential": calibrated | {"sequential": True},
        "one_shot": calibrated,
        "paper": {"init": "paper", "overrides": None},
    }
    jobs += [("upcycle", {}, by_one_rank(name, **settings)) for name, settings in hybrids.items()]
    jobs.append(("sums", {}, {"output": str(tmp_path / "sums")}))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    run_ranks("tests.calibrate.worker", [tmp_path / "jobs.json"], 2, tmp_path)
    for name, oracle in (*((name, material.done) for name in parallelisms), ("few", tmp_path / "few_of_one")):
        verify_manifest(tmp_path / name)
        assert files(tmp_path / name)["windows.safetensors"] == files(oracle)["windows.safetensors"]
        for layer in range(LAYERS):
            one, ours = (load_file(folder / layer_file(layer)) for folder in (oracle, tmp_path / name))
            assert one.keys() == ours.keys() and all(one[n].shape == ours[n].shape for n in one)
            errors = {n: relative_error(ours[n].double(), one[n].double()) for n in one if n != "layer"}
            assert int(ours["layer"]) == layer and max(errors.values()) < FP32 and math.isfinite(sum(errors.values())), errors
    for ours, one in zip(torch.load(tmp_path / "sums"), sums_by_hand(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, one, strict=True))
    for name in hybrids:
        verify_manifest(tmp_path / name)
        ours, one = (files(tmp_path / made / "weights") | files(tmp_path / made) for made in (name, f"{name}_one"))
        assert ours["tensors.json"] == one["tensors.json"] and ours["weights_00000.distcp"] == one["weights_00000.distcp"]
        solved, wanted = (json.loads((tmp_path / f"{made}.json").read_text()) for made in (name, f"{name}_one"))
        assert solved == wanted[len(wanted) - len(solved) :] and bool(solved) == (name != "paper")
    assert not list(tmp_path.glob(".*"))
