"""The training loop as a whole, on one rank: it learns, records, stops, resumes, and refuses what cannot work."""

import contextlib
import gzip
import importlib.util
import json
import re
import signal
import threading
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml

from megatron_hylo.cli.main import EXIT_STOPPED, main
from megatron_hylo.config import ConfigError, RopeScaling, TeacherWindow
from megatron_hylo.config.train import OptimizerSettings
from megatron_hylo.convert.to_hf import convert_megatron_to_hf
from megatron_hylo.eval.runs import read_run, run_state
from megatron_hylo.io.identity import content_identity
from megatron_hylo.models.checkpoint import load_model, save_model
from megatron_hylo.models.description import read_description
from megatron_hylo.models.hylo_model import build_model
from megatron_hylo.train import loop
from megatron_hylo.train.checkpoint import checkpoint_path
from megatron_hylo.train.loop import train, training_step
from megatron_hylo.train.objectives import get_objective
from megatron_hylo.train.optimizer import build_training_state
from tests import held
from tests.train.runs import metrics, start_train, weights


@pytest.mark.parametrize(
    ("stage", "trainable", "align_loss"),
    [
        ("pretrain", "all", "mse"),
        ("distil", "all", "mse"),
        ("align", "all", "mse"),
        ("align", "all", "sequential"),
        ("align", "mixers", "ild"),
        ("align", "all", "ild"),
    ],
)
def test_loss_falls(settings, material, stage, trainable, align_loss):
    config = settings(
        stage,
        steps=20,
        trainable=trainable,
        eval_interval=10,
        align=dict(loss=align_loss),
        logging=dict(tensorboard=True),
        profile=dict(start_step=3, steps=2),
    )
    quality = train(config)
    run = Path(config.output)
    losses = metrics(run)
    assert list(losses) == list(range(1, 21))
    assert sum(losses[s] for s in range(16, 21)) < 0.98 * sum(losses[s] for s in range(1, 6))
    assert list(metrics(run, "heldout_perplexity")) == [10, 20]
    assert abs(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["time"] - time.time()) < 600
    assert metrics(run, "heldout_perplexity")[20] == quality.perplexity
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    with gzip.open(run / "profile" / "steps_3-4_rank_0.json.gz") as trace:
        assert "aten::mm" in {event["name"] for event in json.load(trace)["traceEvents"]}
    assert len(list((run / "profile").iterdir())) == 1
    before, after = weights(material.student), weights(run / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if "self_attention" in name and "norm" not in name} <= changed
    if stage != "align":
        assert changed == set(before)
    elif trainable == "mixers" or align_loss != "ild":  # others have no gradient for anything else
        assert all("self_attention" in name for name in changed)
    else:
        assert changed == {name for name in before if not name.startswith(("embedding.", "output_layer."))}


def test_pretraining_from_scratch_uses_another_models_shape(settings, material):
    config = settings("pretrain", steps=2, model=None, scratch=str(material.student))
    train(config)
    assert weights(Path(config.output) / "model").keys() == weights(material.student).keys()


@pytest.mark.parametrize("length, said", [(144, 144), (16, 128)])
def test_what_is_saved_and_exported_says_the_longest_sequence_it_was_trained_with(settings, material, length, said, tmp_path):
    yarn = RopeScaling("yarn", factor=4.5, original_max_position_embeddings=32)
    config = settings(
        "distil",
        2,
        sequence_length=length,
        train_tokens=2 * 4 * length,
        rope_scaling=yarn,
        teacher_window=TeacherWindow("windows"),
        checkpoint=dict(save_interval=1),
    )
    train(config)
    run = Path(config.output)
    for folder in (run / "model", checkpoint_path(run, 1)):
        assert read_description(folder)[0].max_position_embeddings == said
    convert_megatron_to_hf(run / "model", tmp_path / "hf")
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert values["max_position_embeddings"] == values["hylo"]["max_position_embeddings"] == said
    assert read_description(material.student)[0].max_position_embeddings == 128


def test_a_teacher_whose_head_is_padded_further_teaches_the_same(settings, material, tmp_path):
    teacher = load_model(material.teacher)
    size = teacher.config.hylo.vocab_size
    padded = build_model(teacher.config.hylo.replace(vocab_size=size + 2))
    state = teacher.state_dict()
    for name, tensor in padded.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            (tensor[:size] if len(tensor) == size + 2 else tensor).copy_(state[name])
    save_model(padded, tmp_path / "padded", material.teacher / "tokenizer")
    one, other = settings(output=tmp_path / "one"), settings(output=tmp_path / "other", teacher=str(tmp_path / "padded"))
    assert train(one) == train(other)
    for name in ("loss", "gradient_norm"):
        assert metrics(tmp_path / "one", name) == metrics(tmp_path / "other", name)


def test_interrupt_saves_and_the_same_command_resumes_bit_for_bit(settings, tmp_path):
    stopped = settings(steps=24, output=tmp_path / "stopped", precision="bf16")
    process = start_train(stopped, held.step(20))
    written = tmp_path / "stopped" / "metrics.jsonl"
    while process.poll() is None and not (written.is_file() and written.read_text().count("\n") >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == EXIT_STOPPED, output
    assert "run the same command to resume" in output
    steps_done = len(metrics(tmp_path / "stopped"))
    line = re.search(
        r"[-\d]+ [:\d]+ step 2/24  loss [\d.]+  lr rest [\d.e-]+, mixers [\d.e-]+  [\d,]+ tokens/s"
        r"(?:  input wait [\d.]+%)?  peak memory [\d.]+ GiB  ETA \d+:\d\d:\d\d\n",
        output,
    )
    assert "loss: 1 x KL, nats a token\n" in output and "tokens, bf16, 1 rank\n" in output
    assert re.search(r"about [\de.+-]+ s a step: \d+:\d\d:\d\d for the 22 steps left, until [-\d]+ [:\d]+; evaluations", output)
    assert line is not None, output
    assert line.group() in (tmp_path / "stopped" / "log.txt").read_text()
    assert 3 <= steps_done < 24
    assert [p.name for p in (tmp_path / "stopped" / "checkpoints").iterdir()] == [f"step_{steps_done:08d}"]

    assert run_state(read_run(tmp_path / "stopped", ""))[0] == "stopped"
    train(stopped)
    assert run_state(read_run(tmp_path / "stopped", ""))[0] == "finished"
    starts = [json.loads(line) for line in (tmp_path / "stopped" / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, steps_done]
    assert starts[0]["command"][-2:] == ["--config", f"{stopped.output}.yaml"] and starts[0]["config"] == asdict(stopped)
    assert starts[0]["libraries"]["torch"] == metadata.version("torch")
    provenance = read_description(tmp_path / "stopped" / "model")[1]["provenance"]
    assert provenance["inputs"]["model"]["content_sha256"] == content_identity(stopped.model)
    assert set(provenance["inputs"]) == {"model", "teacher", "data"}
    whole = settings(steps=24, output=tmp_path / "whole", precision="bf16")
    train(whole)
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    mine, theirs = weights(tmp_path / "stopped" / "model"), weights(tmp_path / "whole" / "model")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_finished_run_is_not_repeated_and_another_setting_is_refused(settings):
    config = settings(steps=2)
    quality = train(config)
    model = Path(config.output) / "model" / "manifest.json"
    written = model.stat().st_mtime_ns
    assert train(config) == quality
    assert model.stat().st_mtime_ns == written
    assert len(metrics(Path(config.output))) == 2
    with pytest.raises(
        ConfigError,
        match=r"optimizer\.lr = 0\.002, now 0\.5; use another output .* --allow_change optimizer\.lr\. --model .*/step_0+2 ",
    ):
        train(settings(steps=2, optimizer=OptimizerSettings(lr=0.5, mixer_lr=4e-3, weight_decay=0.1, warmup_ratio=0.0)))
    with pytest.raises(ConfigError, match="train_tokens = 128, now 64"):
        train(settings(steps=1))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
@pytest.mark.parametrize("wrong", [{"logging": {"wandb": "offline"}}, {"model": "no/model"}, {"eval_windows": 0}])
def test_a_start_that_fails_its_checks_leaves_nothing_behind(settings, tmp_path, wrong):
    with pytest.raises(ConfigError):
        train(settings(output=tmp_path / "made" / "run", **wrong))
    assert list(tmp_path.iterdir()) == []


def test_infinite_loss_stops_before_anything_is_saved(settings, tmp_path, material):
    model = load_model(material.student)
    model.decoder.layers[1].mlp.linear_fc1.weight.data[0, 0] = float("nan")
    save_model(model, tmp_path / "broken")
    config = settings(model=str(tmp_path / "broken"), checkpoint=dict(save_interval=1))
    with pytest.raises(
        ConfigError, match="step 4: NaN or infinity, 4 steps in a row .rank 0: loss.*output of layer 1 .*gradients"
    ):
        train(config)
    assert not list(Path(config.output).glob("checkpoints/*"))
    assert metrics(Path(config.output), "skipped_steps") == {1: 1, 2: 2, 3: 3}
    state, message = run_state(read_run(Path(config.output), ""))
    assert state == "failed" and "4 steps in a row" in message
    assert f"failed: {message}" in (Path(config.output) / "log.txt").read_text()


def test_a_step_with_a_gradient_that_is_not_finite_is_left_out(settings, monkeypatch):
    """As if its learning rate were zero: the weights after it are those before it, and training goes on."""
    spoilt, seen = [], []

    def spoiling_objective(*arguments):
        objective = get_objective(*arguments)
        right = objective.forward_backward

        def forward_backward(states, feed, micro_batches):
            found = right(states, feed, micro_batches)
            seen.append(next(states[0].chunks[0].parameters()).detach().clone())
            if len(seen) in spoilt:
                list(states[0].chunks[0].parameters())[-1].main_grad.view(-1)[3] = float("inf")
            return found

        objective.forward_backward = forward_backward
        return objective

    monkeypatch.setattr("megatron_hylo.train.setup.get_objective", spoiling_objective)
    spoilt += [2, 3]
    config = settings(steps=5, checkpoint=dict(save_interval=2))
    quality = train(config)
    assert list(metrics(Path(config.output))) == [1, 4, 5]
    assert metrics(Path(config.output), "skipped_steps") == {2: 1, 3: 2}
    same = [torch.equal(a, b) for a, b in zip(seen, seen[1:])]
    assert same == [False, True, True, False]
    assert quality.perplexity > 0 and all(tensor.isfinite().all() for tensor in weights(Path(config.output) / "model").values())


def test_unknown_key_in_a_recipe_exits_2(settings, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"stage": "pretrain", "data": "d", "output": "o", "scratch": "s", "learning_rat": 1}))
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(recipe)])
    assert stop.value.code == 2
    assert "learning_rat" in capsys.readouterr().err


def test_bf16_keeps_decay_parameters_in_fp32(settings, material):
    config = settings(steps=3, precision="bf16")
    train(config)
    model, start = load_model(Path(config.output) / "model"), load_model(material.student)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {n for n, _ in model.named_parameters() if n.endswith(("A_log", "dt_bias", ".D"))}
    assert len(kept) == 5
    for name, p in model.named_parameters():
        if name in kept:
            assert not torch.equal(p, start.get_parameter(name))
            assert not torch.equal(p, p.bfloat16().float())  # has more digits than bf16 keeps


@pytest.mark.parametrize("mixer_lr", [4e-3, None])
def test_parameter_groups(settings, material, mixer_lr):
    optimizer = OptimizerSettings(
        lr=2e-3, mixer_lr=mixer_lr, weight_decay=0.1, warmup_ratio=0.0, use_distributed_optimizer=False
    )
    config = settings(optimizer=optimizer)
    model = build_model(load_model(material.student).config.hylo)
    state = build_training_state([model], config)
    names = {id(p): name for name, p in model.named_parameters()}
    seen = set()
    for group in state.optimizer.param_groups:
        for name in (names[id(p)] for p in group["params"]):
            seen.add(name)
            assert group["lr"] == (mixer_lr or 2e-3 if ".self_attention." in name else 2e-3), name
            decays = not ("norm" in name or name.endswith(("bias", "A_log", ".D")))
            assert group["wd_mult"] * 0.1 == group["weight_decay"] == (0.1 if decays else 0.0), name
    assert seen == set(names.values())
    assert state.learning_rates() == ({"rest": 2e-3, "mixers": mixer_lr} if mixer_lr else {"rest": 2e-3})


def test_a_run_of_a_version_with_fewer_settings_goes_on(settings):
    """A key that config.json does not have counts as its default; another value is another run."""
    config = settings(steps=2)
    train(config)
    file = Path(config.output) / "config.json"
    saved = json.loads(file.read_text())
    del saved["distil"]
    del saved["optimizer"]["adam_eps"]
    file.write_text(json.dumps(saved))
    train(config)
    with pytest.raises(ConfigError, match=r"was started with distil\.kl_direction = forward, now reverse"):
        train(settings(steps=2, distil=dict(kl_direction="reverse")))


@pytest.mark.parametrize("fails", [False, True])
def test_nobody_reads_on_when_a_run_is_over(settings, monkeypatch, fails):
    readers = []

    def step(*arguments, **options):
        readers.extend(thread for thread in threading.enumerate() if thread.name == "feed")
        if fails and len(readers) > 1:
            raise ConfigError("asked to fail")
        return training_step(*arguments, **options)

    monkeypatch.setattr(loop, "training_step", step)
    with pytest.raises(ConfigError, match="asked to fail") if fails else contextlib.nullcontext() as error:
        train(settings("pretrain", steps=3))
    assert (error is not None) == fails  # and while it is there, so are the frames it went through
    assert readers and not any(thread.is_alive() for thread in readers)
