"""A teacher on disk: what was written comes back, by document and offset; interruptions, damage and strangers are met."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_hylo.config import ConfigError, TeacherWindow
from megatron_hylo.config.recall import RecallSettings
from megatron_hylo.config.train import LoggingSettings, OptimizerSettings, TrainConfig
from megatron_hylo.data.packed import PackedDataset
from megatron_hylo.data.prefetch import ahead
from megatron_hylo.io import DamagedError
from megatron_hylo.models.checkpoint import load_model, save_model
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.platform.distributed import initialize
from megatron_hylo.teachers import store as reader
from megatron_hylo.teachers import store_writer
from megatron_hylo.teachers.store import TeacherStore
from megatron_hylo.teachers.store_writer import write_store
from megatron_hylo.train.loop import train
from megatron_hylo.train.positions import PositionLosses
from megatron_hylo.train.setup import build_run
from tests.conftest import gradients, tiny_config
from tests.parity.cases import make_dataset
from tests.train.runs import metrics, relative_difference

LENGTHS = (16, 40, 3, 1, 64, 100, 7, 200, 33)


def make_data(folder: Path, lengths: tuple[int, ...], seed: int = 0) -> None:
    """A dataset of random tokens in documents of these lengths, held-out ones too."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    for split in ("train", "heldout"):
        builder = IndexedDatasetBuilder(str(folder / f"{split}.bin"), dtype=np.uint16)
        for length in lengths:
            builder.add_document(generator.integers(0, 160, length).tolist(), [length])
        builder.finalize(str(folder / f"{split}.idx"))
    (folder / "data.json").write_text(json.dumps({"vocab_size": 160}))


@pytest.fixture(scope="module")
def material(tmp_path_factory, one_rank) -> SimpleNamespace:
    """Folders `data`, `teacher`, `other` (a teacher), `student`; blocks of 32 tokens and shards of 128."""
    root = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        for module in (reader, store_writer):
            patch.setattr(module, "BLOCK", 32)
            patch.setattr(module, "SHARD", 128)
        patch.setattr(store_writer, "FIT_PIECE", 32)
        make_data(root / "data", LENGTHS)
        for name, pattern, seed in (("teacher", "*-*-", 1), ("other", "*-*-", 2), ("student", "G-+-", 3)):
            initialize(seed=seed)  # gates too are drawn from it
            model = build_model(tiny_config(pattern))
            with torch.no_grad():
                for p in model.parameters():
                    if p.dim() == 2:
                        p.normal_(std=0.15)
            save_model(model, root / name)
        yield SimpleNamespace(root=root, **{name: root / name for name in ("data", "teacher", "other", "student")})


def write(material, output: Path, **settings) -> dict:
    defaults = dict(kl=1e-7, sequence_length=48, overlap=16, micro_batch_size=3, precision=torch.float32)
    return write_store(material.teacher, material.data, output, **(defaults | settings))


@pytest.fixture(scope="module")
def store(material) -> TeacherStore:
    write(material, material.root / "store")
    return TeacherStore(material.root / "store", material.data, material.teacher)


def expected(material, document: int, length: int = 48, overlap: int = 16) -> torch.Tensor:
    """Hidden states of a document, each token from the segment that has it as new, one forward pass a segment."""
    model, stride = load_model(material.teacher), length - overlap
    documents = PackedDataset(f"{material.data}/train", 16, 0).store
    ids = torch.from_numpy(documents.read(document, 0, LENGTHS[document]))
    rows = []
    with torch.no_grad():
        for begin in range(0, len(ids), stride):
            hidden = model(ids[None, begin : begin + length])[:, 0]
            rows.append(hidden if begin == 0 else hidden[overlap:])
            if begin + length >= len(ids):
                break
    return torch.cat(rows)


@pytest.mark.parametrize("document", range(len(LENGTHS)))
def test_every_document_comes_back(material, store, document):
    truth = expected(material, document)
    codes = store.read(document, 0, LENGTHS[document])
    assert codes.dtype == np.int16 and codes.shape == (LENGTHS[document], 3 + 48)
    hidden = store.codec.decode(torch.from_numpy(codes))
    assert (hidden - truth).norm() < 3e-3 * truth.norm()
    middle = LENGTHS[document] // 3
    part = store.read(document, middle, LENGTHS[document] - middle)
    assert np.array_equal(part, codes[middle:])


def test_describes_itself(material, store):
    described = store.description
    assert described["tokens"] == sum(LENGTHS) and described["measured_kl"] == pytest.approx(1e-7, rel=0.3)
    files = sum(file.stat().st_size for file in (store.path / "shards").glob("*.bin"))
    assert described["bytes_per_token"] == files / sum(LENGTHS)
    assert torch.equal(store.head, load_model(material.teacher).head_weight())
    assert len(list((store.path / "shards").glob("*.bin"))) == 4


def test_an_interrupted_writer_goes_on(material, monkeypatch):
    """Killed while it writes the third shard; started again it writes two, and the store is the same as in one go."""
    output, written, right = material.root / "interrupted", [], store_writer._write_shard

    def killed(path: Path, *codes: np.ndarray) -> None:
        if len(written) == 2:
            path.with_suffix(".tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path.name)
        right(path, *codes)

    monkeypatch.setattr(store_writer, "_write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        write(material, output)
    assert not output.exists()
    monkeypatch.setattr(store_writer, "_write_shard", lambda path, *codes: (written.append(path.name), right(path, *codes)))
    write(material, output)
    assert written == ["00000", "00001", "00002", "00003"]
    for file in (material.root / "store" / "shards").iterdir():
        assert (output / "shards" / file.name).read_bytes() == file.read_bytes()
    assert not list(material.root.glob(".interrupted*"))


def test_a_block_damaged_after_opening_is_named(material, store, tmp_path):
    output = tmp_path / "damaged"
    write(material, output)
    broken = TeacherStore(output, material.data)
    file = output / "shards" / "00001.bin"
    raw = bytearray(file.read_bytes())
    edges = json.loads((output / "shards" / "00001.json").read_text())["edges"]
    raw[(edges[2] + edges[3]) // 2] ^= 1
    file.write_bytes(raw)
    assert np.array_equal(broken.read(0, 0, 16), store.read(0, 0, 16))
    with pytest.raises(DamagedError, match=r"00001.bin: block 2 \(tokens from 192\) is damaged"):
        broken.read(5, 68, 40)  # tokens 192 to 231 of all


@pytest.mark.parametrize("name", ["codec.safetensors", "shards/00001.bin", "shards/00001.json", "store.json"])
@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "garbage"])
def test_a_damaged_store_is_refused_when_it_is_opened(material, store, tmp_path, name, damage):
    """Nothing of it is read: a wrong codec or head would train a student on another teacher."""
    shutil.copytree(store.path, tmp_path / "store")
    file = tmp_path / "store" / name
    raw = file.read_bytes()
    flipped = raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:]
    file.write_bytes({"a flipped bit": flipped, "cut short": raw[: len(raw) // 2], "garbage": b"\xff" * len(raw)}[damage])
    with pytest.raises(DamagedError, match=re.escape(str(file))):
        TeacherStore(tmp_path / "store", material.data, material.teacher)


def test_strangers_are_refused(material, store, tmp_path, monkeypatch):
    make_data(tmp_path / "other_lengths", (40, 60))
    make_data(tmp_path / "other_tokens", LENGTHS, seed=1)
    for name in ("other_lengths", "other_tokens"):
        with pytest.raises(ConfigError, match="another text"):
            TeacherStore(store.path, tmp_path / name)
    with pytest.raises(ConfigError, match="another teacher"):
        TeacherStore(store.path, material.data, material.other)
    with pytest.raises(ConfigError, match="not a finished teacher store"):
        TeacherStore(material.teacher, material.data)
    monkeypatch.setattr(reader, "VERSION", 3)
    with pytest.raises(ConfigError, match="has format 2, this version reads 3; cache the teacher again"):
        TeacherStore(store.path, material.data)
    with pytest.raises(ConfigError, match="overlap 48 must be at least 0 and below sequence_length 48"):
        write(material, tmp_path / "x", overlap=48)
    with pytest.raises(ConfigError, match="kl_within None asks for a KL at answers, which the teacher .* never read"):
        settings(material, tmp_path, teacher_store=str(store.path), recall=RecallSettings(0.5, kl_within=None))
    with pytest.raises(ConfigError, match="teacher_store is for stage distil"):
        settings(material, tmp_path, "align", teacher_store=str(store.path))


def settings(material, output: Path, stage: str = "distil", data: Path | None = None, **changes) -> TrainConfig:
    fields = dict(
        data=str(data or material.data), output=str(output), model=str(material.student), sequence_length=16,
        global_batch_size=4, micro_batch_size=2, train_tokens=6 * 4 * 16, precision="fp32", packed_documents=True,
        optimizer=OptimizerSettings(lr=2e-3, warmup_ratio=0.0, adam_eps=1e-3),  # above what the codec changes
        eval_windows=4, logging=LoggingSettings(log_interval=1, tensorboard=False),
    )  # fmt: skip
    return TrainConfig(stage=stage, **(fields | changes))


@pytest.mark.parametrize("packed", [True, False])
def test_training_from_a_store_is_training_with_the_teacher(material, tmp_path, packed):
    """Documents as long as a window, so that both teachers see the same context; without packing only at a window's start."""
    make_data(tmp_path / "data", (16,) * 24)
    write_store(material.teacher, tmp_path / "data", tmp_path / "store", 1e-8, 16, 0, 4, torch.float32)
    runs = []
    for name, teacher in (("online", {}), ("stored", {"teacher_store": str(tmp_path / "store")})):
        config = settings(material, tmp_path / name, data=tmp_path / "data", teacher=str(material.teacher),
                          packed_documents=packed, **teacher)  # fmt: skip
        quality = train(config)
        runs.append((metrics(tmp_path / name), metrics(tmp_path / name, "gradient_norm"), quality.kl))
    (online, norms, kl), (stored, stored_norms, stored_kl) = runs
    assert stored == pytest.approx(online, rel=1e-3)
    assert stored_norms == pytest.approx(norms, rel=1e-3)
    assert stored_kl == pytest.approx(kl, rel=1e-3)
    alone = train(settings(material, tmp_path / "alone", data=tmp_path / "data", teacher_store=str(tmp_path / "store"),
                           packed_documents=packed))  # fmt: skip
    assert metrics(tmp_path / "alone") == stored and alone.kl is None


def test_recall_beside_a_stored_teacher_is_plain_torchs_on_what_the_teacher_read(material, tmp_path):
    """KL at the text's tokens, to the teacher that read their documents without exercises; cross-entropy at the answers."""
    make_dataset(tmp_path / "data")
    whole = TeacherWindow("rope", rotary_base=10000.0)  # its own, so that nothing changes but the window
    write_store(material.teacher, tmp_path / "data", tmp_path / "store", 1e-8, 400, 0, 4, torch.float32, teacher_window=whole)
    recall = RecallSettings(0.7, ["key_value"], answer_weight=3.0)
    fields = dict(
        data=tmp_path / "data", teacher_store=str(tmp_path / "store"), sequence_length=256, packed_documents=False
    )  # fmt: skip
    run = build_run(settings(material, tmp_path / "run", recall=recall, **fields), initialize())
    for wrapper in run.states[0].wrapped:
        wrapper.zero_grad_buffer()
    run.objective.positions = PositionLosses(run.config, run.micro_batches, torch.device("cpu"), sample=10**6)  # all tokens
    found = run.objective.forward_backward(run.states, run.batches(), run.micro_batches)
    by_position = run.objective.positions.means()
    mine = {name: p.main_grad.clone() for name, p in run.students[0][0].named_parameters()}

    student, teacher = load_model(run.config.model).train(), load_model(material.teacher)
    kl, answers, taught = [], [], 0
    for index in range(run.config.global_batch_size):
        window = run.dataset.window(index)
        tokens, places = (torch.from_numpy(x) for x in (window.tokens, window.source_places[:-1]))
        log_p = student.logits(student(tokens[None, :-1]))[0].log_softmax(-1)
        with torch.no_grad():
            read = [
                teacher.logits(teacher(torch.from_numpy(run.dataset.source.store.read(document, 0, start + count))[None]))[0][
                    start:
                ]
                for document, start, count in run.dataset.source.pieces(index)
            ]
        log_q = torch.cat(read).log_softmax(-1)[places[places >= 0]]
        kl.append(F.kl_div(log_p[places >= 0], log_q, log_target=True, reduction="sum"))
        at = torch.from_numpy(window.answers[1:] > 0)
        answers.append(F.cross_entropy(log_p[at], tokens[1:][at], reduction="none"))
        taught += int((places >= 0).sum())
    truth = {"kl": sum(kl) / taught, "answer_cross_entropy": torch.cat(answers).mean()}
    assert by_position["by_position/kl_0-1K"] == pytest.approx(float(truth["kl"]), rel=1e-4)
    truth["loss"] = truth["kl"] + 3.0 * torch.cat(answers).sum() / taught
    assert {name: float(found[name]) for name in truth} == pytest.approx({n: float(x) for n, x in truth.items()}, rel=1e-4)
    truth["loss"].backward()
    difference, name = relative_difference(mine, gradients(student))
    assert difference < 1e-3, name


def test_micro_batches_do_not_matter_to_a_stored_teacher(material, store, tmp_path):
    config = dict(teacher_store=str(store.path))
    train(settings(material, tmp_path / "whole", **config))
    train(settings(material, tmp_path / "one", micro_batch_size=1, **config))
    assert metrics(tmp_path / "one") == pytest.approx(metrics(tmp_path / "whole"), rel=1e-4)


def test_reading_ahead_gives_all_items_and_the_error_in_its_place():
    def items():
        yield from range(10)
        raise DamagedError("block 7")

    found = []
    with pytest.raises(DamagedError, match="block 7"):
        for item in ahead(items()):
            found.append(item)
    assert found == list(range(10))
