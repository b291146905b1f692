"""The wheel, away from the repository: everything it needs is inside, and the public interface runs in one plain process."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.calibrate.conftest import make_text
from tests.conftest import tiny_hf_model
from tests.data.conftest import tokenizer  # noqa: F401  the fixture

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys, pathlib
import megatron_hylo as mh
assert pathlib.Path(mh.__file__).is_relative_to(sys.prefix), mh.__file__
assert callable(mh.convert) and callable(mh.train) and mh.TrainConfig and mh.UpcycleConfig
assert not {"torch", "transformers", "megatron"} & set(sys.modules)
from megatron_hylo.data.preprocess import preprocess
mh.convert("hf", "base")
preprocess("text.jsonl", "data", "hf", heldout_fraction=0.2)
mh.calibrate("base", "data", "calibration", tokens=320, sequence_length=16)
report = mh.upcycle("base", "hybrid", pattern="G+M", init="paper", calibration="calibration")
model = mh.load("hybrid")
before = mh.evaluate(model, "data", teacher="base", sequence_length=16, windows=4)
assert abs(mh.evaluate("hybrid", "data", "base", 16, 4).kl - before.kl) < 1e-5 * before.kl
after = mh.train(
    stage="distil", model="hybrid", teacher="base", data="data", output="run", precision="fp32", sequence_length=16,
    global_batch_size=4, train_tokens=640, eval_windows=4, logging={"tensorboard": False},
    checkpoint={"async_save": False}, optimizer={"lr": 1e-2},
)
assert after.kl < before.kl, (before, after)
again = mh.evaluate("run/model", "data", "base", 16, 4)
assert abs(again.kl - after.kl) < 1e-5 * after.kl, (again, after)
mh.export("run/model", "export")
assert mh.generate("export", "some words", max_new_tokens=3).new_tokens == 3
import megatron_hylo.train.loop as loop  # packages of the same names are still packages
assert loop.train.__module__ == "megatron_hylo.train.loop" and megatron_hylo_is_one(mh)
""".replace("megatron_hylo_is_one(mh)", "mh.train.loop is loop")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """An environment with the wheel alone; its dependencies are this environment's."""
    root = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    environment = os.environ | {"PIP_NO_INDEX": "1"}
    source = root / "source"  # setuptools leaves build/ beside what it builds
    copy_tree(source)
    build = [*command, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", root, source]
    done = subprocess.run(build, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    venv.create(root / "env", symlinks=True, with_pip=False)
    python = root / "env" / "bin" / "python"
    site = next((root / "env" / "lib").glob("python*/site-packages"))
    (wheel,) = root.glob("megatron_hylo-*.whl")
    subprocess.run([*command, "--python", python, "install", "--no-deps", wheel], env=environment, check=True)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return root / "env"


def copy_tree(target: Path) -> None:
    """Copy the sources of the wheel to another place."""
    target.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    shutil.copytree(ROOT / "megatron_hylo", target / "megatron_hylo", ignore=shutil.ignore_patterns("__pycache__"))


def run(installed: Path, folder: Path, *words: object) -> subprocess.CompletedProcess:
    """A program of the environment, in a folder, knowing nothing of the repository."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    command = [installed / "bin" / str(words[0]), *map(str, words[1:])]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=800)


def test_the_wheel_holds_recipes_scripts_and_tuned_configurations(installed, tmp_path):
    package = next((installed / "lib").glob("python*/site-packages/megatron_hylo"))
    for pattern in ("recipes/*.yaml", "slurm/*.sh", "kernels/tuned/*.json", "hf/*.py", "py.typed"):
        ours = {path.relative_to(ROOT / "megatron_hylo") for path in (ROOT / "megatron_hylo").glob(pattern)}
        assert ours and ours == {path.relative_to(package) for path in package.glob(pattern)}, pattern
    done = run(installed, tmp_path, "hylo", "scripts", "mine")
    assert done.returncode == 0, done.stderr
    made = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "mine").rglob("*") if path.is_file())
    recipe = "mine/megatron_hylo/recipes/stage1_ild_llama3.2-1b.yaml"
    assert recipe in made and "mine/slurm/common.sh" in made
    assert (tmp_path / recipe).read_bytes() == (ROOT / recipe.removeprefix("mine/")).read_bytes()
    stage = subprocess.run(
        ["bash", tmp_path / "mine" / "slurm" / "stage1_ild.sh"], cwd=tmp_path, capture_output=True, text=True
    )
    assert stage.returncode == 2 and "data.json: set HYLO_ROOT" in stage.stderr  # it found the recipe


def test_the_public_interface_runs_from_text_to_text_in_one_process(installed, tmp_path, tokenizer):  # noqa: F811
    tiny_hf_model("llama", vocab_size=304).save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": document.text}) for document in make_text(30)))
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run(installed, tmp_path, "python", "-W", "ignore", "program.py")
    assert done.returncode == 0, done.stderr[-3000:]
