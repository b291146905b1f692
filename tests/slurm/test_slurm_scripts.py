"""The cluster's face: scripts that shellcheck accepts, recipes that load, a stage run, stopped and resumed without Slurm."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_hylo.cli.parser import build_parser
from megatron_hylo.cli.train import train
from megatron_hylo.config import ConfigError
from megatron_hylo.config.layouts import BASES, LAYOUTS
from megatron_hylo.config.mixers import MIXERS
from megatron_hylo.config.recipe_families import FAMILIES
from megatron_hylo.config.recipe_families import STAGES as TRAINING_STAGES
from megatron_hylo.config.recipes import default_files, recipe, recipe_files, stage_scripts
from megatron_hylo.config.train import TrainConfig
from megatron_hylo.config.train_settings import flatten
from megatron_hylo.eval.runs import read_lines
from megatron_hylo.io import verify_manifest
from tests.forked import running
from tests.slurm.tiny_root import make_root

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*ROOT.glob("slurm/*.sh"), *ROOT.glob("examples/*/*.sh")]) + [ROOT / ".ci" / "run"]
RECIPES = sorted(ROOT.glob("megatron_hylo/recipes/*.yaml"))
STAGES = sorted(ROOT.glob("slurm/stage*.sh"))

# stage, tokens, peak learning rate, sequences a step, YaRN factor: the paper's for 1B; of 128K, which it did not train, ours
HYLO = {
    "stage1_ild_llama3.2-1b": ("align", 2048, 2e-4, 96, None),
    "stage2_ctx8k_llama3.2-1b": ("distil", 8192, 6e-5, 32, 4.0),
    "stage3_ctx64k_llama3.2-1b": ("distil", 65536, 6e-5, 8, 32.0),
    "stage3_ctx128k_llama3.2-1b": ("distil", 131072, 6e-5, 4, 64.0),
}
PATHS = ["--model", "m", "--teacher", "t", "--data", "d", "--output", "o"]


@functools.cache
def train_parser():
    return build_parser((train,))


def load_recipe(file: Path) -> TrainConfig:
    """A recipe as `hylo train` reads it, with the four paths that recipes leave out."""
    parser = train_parser()
    values = parser.instantiate(parser.parse_args(["train", "--config", str(file), *PATHS]))["train"]
    return TrainConfig(**{name: value for name, value in values.items() if name in TrainConfig.__dataclass_fields__})


def test_shellcheck_accepts_all_scripts():
    here = str(Path(sys.executable).parent)
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join([here, os.environ["PATH"]]))
    assert shellcheck, "install the package's [dev] requirements: shellcheck is one of them"
    result = subprocess.run([shellcheck, "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_recipe_has_the_papers_hyperparameters(file):
    config = load_recipe(file)
    scaling = config.rope_scaling
    found = (config.stage, config.sequence_length, config.optimizer.lr, config.global_batch_size, scaling and scaling.factor)
    assert found == HYLO[file.stem]
    assert config.optimizer.warmup_ratio == 0.01
    assert config.stage != "align" or (config.align.loss, config.trainable) == ("ild", "all")
    assert scaling is None or scaling.factor * scaling.original_max_position_embeddings == config.sequence_length
    assert config.micro_batches(8 // config.parallel.model_parallel_size) >= 1  # the scripts ask for 8 GPUs


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_every_key_of_a_recipe_is_commented(file):
    keys = [line for line in file.read_text().splitlines() if re.match(r"\s*\w+:", line)]
    assert len(keys) > 30
    assert [line for line in keys if not re.search(r"\s# \S", line)] == []


def test_recipe_files_are_what_the_generator_writes():
    assert {file.name: file.read_text() for file in RECIPES} == default_files()


def test_recipes_of_all_layouts_and_stages_are_commented_and_refuse_others():
    keys = set(flatten(yaml.safe_load(recipe("llama3.2-1b-4mla12gdn", "stage3_ctx64k"))))
    for layout in LAYOUTS:
        for stage in TRAINING_STAGES:
            text = recipe(layout, stage)
            lines = [line for line in text.splitlines() if re.match(r"\s*\w+:", line)]
            assert [line for line in lines if not re.search(r"\s# \S", line)] == []
            assert {"seed", "sequence_length", "text.packing", "parallel.context_parallel_size"} <= set(
                flatten(yaml.safe_load(text))
            ) & keys
    with pytest.raises(ConfigError, match="no recipe of stage 'stage4'; choose one of stage1_ild, "):
        recipe("llama3.2-1b-4mla12gdn", "stage4")
    with pytest.raises(ConfigError, match="unknown layout"):
        recipe("llama", "stage1_ild")


@pytest.mark.parametrize("layout", ["llama3.2-3b-14mla14gdn", "qwen3-1.7b-14mla14m2", "smollm2-135m-8mla22gdn-teacher"])
def test_recipes_of_other_layouts_load_and_fit_model_and_teacher(layout, tmp_path):
    shape, family = LAYOUTS[layout].config, FAMILIES[LAYOUTS[layout].base]
    for name, text in recipe_files(layout).items():
        (tmp_path / name).write_text(text)
        config = load_recipe(tmp_path / name)
        assert config.sequence_length == TRAINING_STAGES[name.removesuffix(f"_{layout}.yaml")]
        ranks = config.parallel
        counts = [n for m in set(shape.mixers) for n in MIXERS[m].tensor_parallel_counts(shape).values()]
        assert not any(n % ranks.tensor_model_parallel_size for n in counts)
        assert config.micro_batches(family.gpus // ranks.model_parallel_size) >= 1
        teacher = BASES[family.teacher[1]] if config.stage == "distil" else BASES[LAYOUTS[layout].base]
        config.teacher_window.check(teacher, config.sequence_length, "the teacher")
        times = config.sequence_length / teacher.max_position_embeddings
        assert config.teacher_window.mode == ("none" if times <= 1 else "windows")
        recall = (0.0, 1.0) if config.stage == "align" else (0.2, 1.0) if times <= 1 else (0.3, 10.0)
        assert (config.recall.share, config.recall.answer_weight) == recall


def test_scripts_of_another_layout_name_its_recipes_models_and_gpus():
    layout = "smollm2-135m-8mla22gdn-teacher"
    made = stage_scripts(layout, ROOT / "slurm")
    assert sorted(made) == sorted(f"{stage}.sh" for stage in TRAINING_STAGES)
    for stage in TRAINING_STAGES:
        text = made[f"{stage}.sh"]
        assert f"recipes/{stage}_{layout}.yaml" in text and f"stage={stage}\n" in text and "--gpus-per-node=1\n" in text
        assert "llama" not in text and '/models/smollm2-135m"' in text
    assert f'/models/{layout}"' in made["stage1_ild.sh"] and "64" not in made["stage3_ctx32k.sh"].split("MODEL, the")[0]


def test_every_recipe_has_a_script_and_every_script_a_recipe():
    used = [re.search(r"recipes/(\S+)\.yaml", script.read_text()).group(1) for script in STAGES]
    assert sorted(used) == sorted(HYLO) == [file.stem for file in RECIPES]


def test_both_recipes_of_the_image_are_of_one_base_packages_and_files():
    docker, apptainer = ((ROOT / "slurm" / name).read_text() for name in ("Dockerfile", "hylo.def"))
    assert re.search(r"ARG BASE=(\S+)", docker)[1] == re.search(r"From: (\S+)", apptainer)[1]
    packages = [
        re.search(r"apt-get install --yes --no-install-recommends ([a-z0-9 -]+)", text)[1].split()
        for text in (docker, apptainer)
    ]
    assert packages[0] == packages[1] and "procps" in packages[0]
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", docker, re.M) for word in line.split()]
    assert copied == re.findall(r"^    (\S+) /src/", apptainer, re.M) and all((ROOT / name).exists() for name in copied)
    sent = set(re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.M))
    assert (
        sent == set(copied) and "pip install" in docker and "--constraint constraints.txt" in docker and ".[gpu]" in apptainer
    )


@pytest.fixture
def hylo_root(one_rank, tmp_path) -> Path:
    """A folder laid out as the scripts expect it: a teacher, an aligned student wider than it, and text."""
    return make_root(tmp_path)


def script(hylo_root: Path, steps: int) -> tuple[list[str], dict[str, str]]:
    """Command and environment of the 128K stage, made tiny: `steps` steps of 2 x 64 tokens in fp32 on 2 ranks."""
    overrides = {
        "sequence_length": 64, "global_batch_size": 2, "train_tokens": steps * 128, "precision": "fp32",
        "logging.log_interval": 1, "eval_windows": 2, "optimizer.lr": 1e-3, "recall.share": 0,
    }  # fmt: skip
    command = ["bash", str(ROOT / "slurm" / "stage3_ctx128k.sh"), *(f"--{key}={value}" for key, value in overrides.items())]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") and k not in ("RANK", "WORLD_SIZE")}
    return command, clean | {"HYLO_ROOT": str(hylo_root), "NPROC_PER_NODE": "2", "HYLO_PYTHON": sys.executable}


def logged_steps(run: Path) -> list[int]:
    """Steps of training lines in a run's metrics, in the order they were written."""
    return [line["step"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]


def stop_after_a_step(command: list[str], environment: dict[str, str], run: Path, number: int) -> tuple[int, str]:
    """Start the script, signal it once it has logged a step more; its exit status and what it printed."""
    before, output = len(logged_steps(run)), run.parent / "output.txt"
    with (
        open(output, "w") as file,
        running(command, env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT) as process,
    ):
        deadline = time.monotonic() + 300
        while len(logged_steps(run)) == before:
            assert process.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.2)
        process.send_signal(number)
        return process.wait(timeout=300), output.read_text()


@pytest.mark.multirank
def test_stage3_script_trains_on_two_ranks_saves_at_a_signal_and_resumes_to_its_end(hylo_root):
    run = hylo_root / "stage3_ctx128k"
    command, environment = script(hylo_root, steps=5000)
    code, output = stop_after_a_step(command, environment, run, signal.SIGUSR1)  # as from Slurm before the time limit
    assert code == 3, output  # as `hylo train`: stopped, and resumable
    newest, steps = max((run / "checkpoints").glob("step_*")), logged_steps(run)
    verify_manifest(newest)
    assert newest.name == f"step_{steps[-1]:08d}" and not (run / "stop_requested").exists()
    total = steps[-1] + 2
    command, environment = script(hylo_root, steps=total)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with running([*command, "--allow_change=train_tokens"], env=environment, cwd=ROOT, **pipes) as process:
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert logged_steps(run) == list(range(1, total + 1))  # the second start went on where the first had stopped
    verify_manifest(run / "model")
    for line in [line for line in read_lines(run / "metrics.jsonl") if "loss" in line]:
        # one bucket holds all tokens, of tensor and sequence parallelism too
        assert line["by_position/kl_0-1K"] == pytest.approx(line["kl"], rel=1e-4)
        assert line["by_position/cross_entropy_0-1K"] == pytest.approx(line["cross_entropy"], rel=1e-5)
    scaling = json.loads((run / "model" / "hylo.json").read_text())["model"]["mla_rope_scaling"]
    assert (scaling["rope_type"], scaling["factor"]) == ("yarn", 64.0)
