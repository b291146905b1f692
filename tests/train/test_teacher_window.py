"""A teacher past its window: stretched positions against transformers, windows by hand, and what is refused."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
import transformers

from megatron_hylo.cli.main import evaluate
from megatron_hylo.config import ConfigError, ModelConfig, RopeScaling, TeacherWindow
from megatron_hylo.config.train import KLSettings, TrainConfig
from megatron_hylo.convert.to_megatron import convert_hf_to_megatron
from megatron_hylo.data.packed import PackedDataset
from megatron_hylo.distill.head_loss import model_head_loss
from megatron_hylo.models.checkpoint import load_model, save_model
from megatron_hylo.models.frozen import freeze
from megatron_hylo.teachers.store import StoredTeacher, TeacherStore
from megatron_hylo.teachers.store_writer import write_store
from megatron_hylo.train.loop import train
from megatron_hylo.train.setup import build_run
from tests.conftest import tiny_config, tiny_hf_model, uneven_model
from tests.models.test_windows import by_hand
from tests.train.runs import metrics, relative_difference

YARN = RopeScaling("yarn", factor=4.0, original_max_position_embeddings=32)
WAYS = {
    "yarn": (
        TeacherWindow("rope", YARN),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0},
    ),
    "yarn and theta": (
        TeacherWindow("rope", YARN, rotary_base=5e4),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 5e4},
    ),
    "linear": (
        TeacherWindow("rope", RopeScaling("linear", 4.0)),
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    ),
    "theta": (TeacherWindow("rope", rotary_base=8e5), {"rope_type": "default", "rope_theta": 8e5}),
    "NoPE": (TeacherWindow("rope", RopeScaling("nope")), {"rope_type": "default", "rope_theta": 10000.0}),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory, one_rank):
    """(Hugging Face folder, model folder) of a Llama with a window of 32 tokens."""
    root = tmp_path_factory.mktemp("llama")
    tiny_hf_model("llama", max_position_embeddings=32).save_pretrained(root / "hf")
    convert_hf_to_megatron(root / "hf", root / "teacher", verify=False)
    return root / "hf", root / "teacher"


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_stretched_positions_match_transformers(way, llama):
    window, parameters = WAYS[way]
    config = transformers.AutoConfig.from_pretrained(llama[0])
    config.rope_parameters, ids = parameters, torch.randint(160, (2, 128))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(llama[0], config=config).eval()
    if way == "NoPE":  # Llama has no such setting: frequencies of zero turn nothing
        theirs.model.rotary_emb.inv_freq.zero_()
    model = load_model(llama[1], **window.changes())
    window.check(load_model(llama[1]).config.hylo, 128, "it")
    expected = theirs.model(ids).last_hidden_state.transpose(0, 1)
    torch.testing.assert_close(freeze([model])(ids), expected, rtol=0, atol=2e-5)
    assert (load_model(llama[1])(ids) - expected).abs().max() > 0.1


@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients_are_those_of_windows_read_by_hand(packed, settings, one_rank):
    config = settings(
        sequence_length=40, packed_documents=packed, distil=dict(ce_weight=0.3), global_batch_size=2,
        teacher_window=TeacherWindow("windows", length=12),
    )  # fmt: skip
    run = build_run(config, one_rank)
    (student,), (state,) = run.students, run.states
    (batch,) = itertools.islice(run.batches(), 1)
    found = run.objective.forward_backward([state], iter([batch]), 1)
    gradients = {name: p.main_grad.clone() for name, p in student[0].named_parameters()}

    own = load_model(config.teacher).requires_grad_(False).eval()
    ids, documents = batch["input_ids"], batch.get("documents")
    edges = [*documents.starts.tolist(), ids.shape[1]] if packed else [0, ids.shape[1]]
    hidden = torch.cat([by_hand(own, ids[:, a:b], 12) for a, b in zip(edges, edges[1:])])
    for wrapper in state.wrapped:
        wrapper.zero_grad_buffer()
    loss = model_head_loss(student[0], student[0](ids, documents), batch["labels"], own, hidden, KLSettings(ce_weight=0.3))
    loss.loss.backward()
    expected = {name: p.main_grad for name, p in student[0].named_parameters()}
    assert found["loss"].item() == pytest.approx(loss.loss.item(), rel=1e-6)
    assert found["kl"].item() == pytest.approx(loss.kl.item(), rel=1e-6)
    assert relative_difference(gradients, expected)[0] < 1e-5


def test_a_sequence_longer_than_the_window_is_refused_with_the_ways_out(settings, material, tmp_path):
    ways = (
        "window of 128 tokens.*Add --teacher_window.mode windows .*as recipes do with .*answer_weight 10.*"
        "--teacher_window.mode rope .YaRN by 1.125.*recall with a weight of 1; or take --sequence_length 128.*a longer"
    )
    with pytest.raises(ConfigError, match=f"sequence_length 144.*{ways}"):
        train(settings(sequence_length=144))
    with pytest.raises(ConfigError, match=ways):
        write_store(material.teacher, material.data, tmp_path / "store", sequence_length=144)
    with pytest.raises(ConfigError, match="lets it read 128 tokens, sequence_length is 200; raise its factor"):
        TeacherWindow("rope", YARN).check(tiny_config("*-", max_position_embeddings=32), 200, "it")
    with pytest.raises(ConfigError, match="length 64 is more than the 32 tokens of the window of it"):
        TeacherWindow("windows", length=64).check(tiny_config("*-", max_position_embeddings=32), 200, "it")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(mode="window"), "'window' is not supported; use none, rope or windows"),
        (dict(mode="windows", rope_scaling=YARN), "takes teacher_window.rope_scaling .yarn by 4., got mode windows"),
        (
            dict(rotary_base=1e6),
            "takes teacher_window.rotary_base .1e\\+06., got mode none; set teacher_window.rotary_base null",
        ),
        (dict(mode="rope", rotary_base=1e6, length=8), "length 8 .* is for teacher_window.mode windows"),
        (dict(mode="windows", length=1), "length 1 must be at least 2"),
        (dict(mode="rope", rotary_base=-1.0), "rotary_base must be positive"),
    ],
)
def test_settings_that_contradict_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        TeacherWindow(**fields)


def test_a_run_refuses_what_its_stage_or_teacher_cannot_do(settings):
    windows = TeacherWindow("windows")
    with pytest.raises(ConfigError, match="of the last alone; use mode rope or shorter sequences"):
        settings("align", teacher_window=windows)
    with pytest.raises(ConfigError, match="give it to `hylo serve-teacher`"):
        settings(teacher=None, teacher_address="localhost:1", teacher_window=windows)


def test_the_own_window_of_a_teacher():
    yarn = tiny_config("*-", max_position_embeddings=32, rope_scaling=YARN)
    own: list[ModelConfig] = [yarn, yarn.replace(max_position_embeddings=256), tiny_config("*-", max_position_embeddings=32)]
    assert [TeacherWindow().reach(c) for c in own] == [128, 256, 32]
    assert TeacherWindow("windows").reach(yarn) is None
    assert [TeacherWindow("windows").window(own[2], n) for n in (32, 33)] == [None, 32]


def test_a_factor_that_is_left_out_is_derived():
    """YaRN by the smallest factor that reaches, from what the teacher's frequencies were trained for."""
    rope = TeacherWindow("rope")
    plain, yarn = (
        tiny_config("*-", max_position_embeddings=32),
        tiny_config("*-", rope_scaling=YARN, max_position_embeddings=32),
    )
    qwen = plain.replace(model_family="qwen3", max_position_embeddings=40960)
    for config, length, factor, origin in ((plain, 80, 2.5, 32), (yarn, 160, 5.0, 32), (qwen, 65536, 2.0, 32768)):
        found = rope.resolve(config, length)
        assert found == TeacherWindow("rope", RopeScaling("yarn", factor=factor, original_max_position_embeddings=origin))
        assert found.reach(config) == length
        rope.check(config, length, "it")
    assert rope.resolve(plain, 32) == rope.resolve(yarn, 128) == TeacherWindow()
    llama3 = plain.replace(rope_scaling=RopeScaling("llama3", 8.0, 16))
    with pytest.raises(ConfigError, match="this one has llama3: give teacher_window.rope_scaling"):
        rope.check(llama3, 64, "it")
    with pytest.raises(ConfigError, match="Add --teacher_window.mode windows .*the better way.*mode rope .YaRN by 5: its"):
        TeacherWindow().check(plain, 160, "it")
    with pytest.raises(ConfigError, match="mode rope .with --teacher_window.rope_scaling: its positions"):
        TeacherWindow().check(llama3, 64, "it")


def test_a_run_a_store_and_an_evaluation_derive_what_they_would_be_told(settings, material, one_rank, tmp_path):
    told = TeacherWindow("rope", RopeScaling("yarn", factor=1.25, original_max_position_embeddings=128))
    fields: dict = dict(steps=1, sequence_length=160, global_batch_size=1, micro_batch_size=1, train_tokens=160, eval_windows=1)
    for name, ways in (("derived", TeacherWindow("rope")), ("told", told)):
        train(settings(output=tmp_path / name, teacher_window=ways, **fields))
        write_store(material.teacher, material.data, tmp_path / f"{name}_store", 1e-3, 160, teacher_window=ways)
    assert metrics(tmp_path / "derived", "kl") == metrics(tmp_path / "told", "kl")
    assert metrics(tmp_path / "derived", "heldout_kl") == metrics(tmp_path / "told", "heldout_kl")
    described = [json.loads((tmp_path / f"{name}_store" / "store.json").read_text()) for name in ("derived", "told")]
    assert described[0] == described[1] and described[0]["teacher_window"]["rope_scaling"]["factor"] == 1.25


def test_a_store_is_of_windows_and_says_so(settings, material, one_rank, tmp_path, monkeypatch):
    """Its teacher read as asked; a run that asks for another reading is refused, one that asks for none takes the store's."""
    windows = TeacherWindow("windows", length=12)
    described = write_store(
        material.teacher, material.data, tmp_path / "store", kl=1e-8, sequence_length=40, precision=torch.float32,
        teacher_window=windows,
    )  # fmt: skip
    assert (described["sequence_length"], described["overlap"]) == (12, 6)
    config = settings(steps=5, sequence_length=40, teacher=None, teacher_store=str(tmp_path / "store"))
    store = TeacherStore(tmp_path / "store", material.data)
    document = int(store.starts.argmax()) - 1
    length = int(store.starts[document + 1] - store.starts[document])
    ids = torch.from_numpy(PackedDataset(f"{config.data}/train", 40, 0).store.read(document, 0, length))[None]
    hidden = StoredTeacher(store, torch.float32).store.codec.decode(torch.from_numpy(store.read(document, 0, length)))
    teacher = load_model(material.teacher).eval()
    expected = by_document_start(teacher, ids, 12)
    assert (hidden - expected).norm() < 2e-3 * expected.norm()
    assert (teacher(ids)[:, 0] - expected).norm() > 5e-3 * expected.norm()
    with pytest.raises(ConfigError, match="made with teacher_window .*'windows'.*, the run says .*'rope'"):
        train(replace(config, teacher_window=TeacherWindow("rope", YARN)))
    train(replace(config, teacher_window=windows))
    assert len(metrics(tmp_path / "run")) == 2


@torch.no_grad()
def by_document_start(model, ids: torch.Tensor, window: int) -> torch.Tensor:
    """A store's segments begin half a window apart; the last one is shorter."""
    states, half = [model(ids[:, :window])[:, 0]], window // 2
    for begin in range(half, ids.shape[1] - half, half):
        states.append(model(ids[:, begin : begin + window])[half:, 0])
    return torch.cat(states)


def test_a_run_in_windows_goes_on_where_it_stopped_being_the_same_run(settings, tmp_path):
    """A changed reading is another teacher, which resume refuses."""
    config = settings(steps=2, sequence_length=40, teacher_window=TeacherWindow("windows", length=12))
    quality = train(config)
    assert quality is not None and quality.kl is not None and quality.kl > 0
    with pytest.raises(ConfigError, match="was started with teacher_window.length = 12, now 16"):
        train(replace(config, teacher_window=TeacherWindow("windows", length=16), train_tokens=3 * 4 * 40))


def test_evaluation_reads_the_teacher_as_asked(material, capsys, tmp_path):
    kls = []
    for window in (TeacherWindow(), TeacherWindow("windows", length=12)):
        evaluate(material.student, material.data, material.teacher, 40, 4, window)
        kls.append(json.loads(capsys.readouterr().out)["kl"])
    assert kls[0] != pytest.approx(kls[1], rel=1e-4)
    short = load_model(material.teacher, max_position_embeddings=32)
    save_model(short, tmp_path / "short", material.teacher / "tokenizer")
    with pytest.raises(ConfigError, match="more than the window of 32 tokens"):
        evaluate(material.student, material.data, tmp_path / "short", 40, 4)


@pytest.mark.parametrize("stage", ["align", "distil", "distil from a store"])
def test_a_stretched_teacher_is_one_that_was_saved_so(settings, material, tmp_path, one_rank, stage):
    """Losses of a step past its window, and far from those of positions as they are; a store's hidden states are rounded."""
    own, ways = tmp_path / "own", TeacherWindow("rope", RopeScaling("yarn", factor=8.0, original_max_position_embeddings=24))
    torch.manual_seed(0)  # of most weights, not of all, positions change a loss by more than rounding does
    save_model(uneven_model("*-*-*-*-", vocab_size=304).float(), own, material.teacher / "tokenizer")
    for name, changes in (("saved", ways.changes()), ("longer", {"max_position_embeddings": 256})):
        save_model(load_model(own, **changes), tmp_path / name, material.teacher / "tokenizer")
    found = {}
    for name, window in (("own", ways), ("saved", TeacherWindow()), ("longer", TeacherWindow())):
        where: dict = dict(teacher=str(tmp_path / name), teacher_window=window)
        if stage.endswith("store") and name == "own":
            store = tmp_path / "store"
            write_store(own, material.data, store, 1e-8, 192, 0, precision=torch.float32, teacher_window=window)
            where = dict(teacher=None, teacher_store=str(store))
        config = settings(
            stage.split()[0], sequence_length=192, global_batch_size=1, micro_batch_size=1,
            packed_documents=stage.endswith("store"), **where,  # a store read each document by itself
        )  # fmt: skip
        run = build_run(config, one_rank)
        found[name] = float(run.objective.forward_backward(run.states, run.batches(), run.micro_batches)["loss"])
    near = 3e-3 if stage.endswith("store") else 1e-7
    assert found["own"] == pytest.approx(found["saved"], rel=near)
    assert found["own"] != pytest.approx(found["longer"], rel=3 * near)


def test_a_run_keeps_the_students_new_positions(settings, tmp_path):
    config: TrainConfig = settings(steps=1, rope_scaling=YARN, rotary_base=5e4)
    train(config)
    c = load_model(tmp_path / "run" / "model").config.hylo
    assert (c.rope_scaling, c.mla_rope_scaling, c.rotary_base) == (YARN, YARN, 5e4)
    back = settings(steps=1, model=str(tmp_path / "run" / "model"), output=tmp_path / "next", rope_scaling=RopeScaling("nope"))
    train(back)
    c = load_model(tmp_path / "next" / "model").config.hylo
    assert (c.rope_scaling.rope_type, c.mla_rope_scaling.rope_type, c.rotary_base) == ("nope", "nope", 5e4)
