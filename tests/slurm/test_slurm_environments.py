"""The scripts under the environments that clusters make: the real scripts, with fake Slurm commands and a fake torchrun."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.forked import running

ROOT = Path(__file__).parents[2]
STAGES = sorted(path.stem for path in ROOT.glob("slurm/stage*.sh"))
FAKES = {
    # more names than a pipe holds: whoever stops reading them early kills it
    "scontrol": """
        case "$1 $2" in
            "show hostnames")
                [[ "$3" == node* ]] || { echo "Invalid hostlist: $3" >&2; exit 1; }
                seq -f "node%.0f" 1 ${HOSTS:-50000} ;;
            "show job") printf 'JobId=%s\\n Command=%s --x /b/c.sh\\n  Partition=gpu\\n' "$3" "${COMMAND:-(null)}" ;;
            "show node") printf 'NodeName=%s\\n   NodeAddr=%s State=%s\\n' "$3" "$3" "${STATE:-IDLE}" ;;
            *) printf '%s\\0' "$@" >"$RECORD/scontrol"; exit "${REQUEUE_EXIT:-0}" ;;
        esac""",
    "squeue": 'echo "1234.batch"; [[ -z "${STEP_STAYS:-}" ]] || echo "1234.0"',
    "srun": 'printf "%s\\0" "$@" >"$RECORD/srun"; while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "sbatch": """
        printf '%s\\0' "$@" >>"$RECORD/sbatch"; printf '%s\\0' "$MODEL" "${TEACHER:-}" "${OUTPUT:-}" >>"$RECORD/paths"
        echo "7;one" """,
    "sleep": "/bin/sleep 0.05",
    "nvidia-smi": 'for i in 0 1 2 3; do echo "GPU $i: made"; done',
    "torchrun": """
        printf '%s\\0' "$@" >"$RECORD/torchrun"; pwd >"$RECORD/pwd"
        [[ -z "${FAILS:-}" ]] || { echo start >>"$RECORD/starts.txt"; exit "$FAILS"; }
        [[ -n "${UNTIL_ASKED:-}" ]] || exit 0
        while [[ ! -e "$HYLO_STOP_FILE" ]]; do sleep 1; done
        [[ "$UNTIL_ASKED" == yes ]] || exit 3
        mkdir -p "$(dirname "$HYLO_STOP_FILE")/checkpoints/step_00000001"
        echo {} >"$_/manifest.json"
        [[ -z "${WRITES:-}" ]] || { mkdir -p "$WRITES" && echo "$$" >"$WRITES/manifest.json"; }
        exit 3 """,
}
JOB = {
    "SLURM_JOB_ID": "1234", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_ON_NODE": "64",
    "SLURM_GPUS_ON_NODE": "8", "SLURM_SUBMIT_DIR": str(ROOT),
}  # fmt: skip


@dataclass
class Ran:
    """How a script ended, and with what it started the others."""

    code: int
    output: str
    error: str
    arguments: dict[str, list[str]]  # of each fake that was started

    def option(self, name: str, fake: str = "torchrun") -> str | None:
        """The last value of --name, as one word or two."""
        words, value = self.arguments.get(fake, []), None
        for word, following in zip(words, [*words[1:], ""], strict=True):
            if word.startswith(f"--{name}="):
                value = word.split("=", 1)[1]
            elif word == f"--{name}":
                value = following
        return value


class Cluster:
    """Fake commands, and a HYLO_ROOT (with a space in it) that holds what the stages start from."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "my runs"
        for name, body in FAKES.items():
            file = folder / "bin" / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"#!/usr/bin/env bash\nset -u\n{body}\n")
            file.chmod(0o755)
        for file in ("models/llama3.1-8b/hylo.json", "stage1_ild/model/hylo.json", "data/mix/data.json"):
            (self.root / file).parent.mkdir(parents=True)
            (self.root / file).write_text("{}")
        (folder / "record").mkdir()

    def environment(self, **changes: str | None) -> dict[str, str]:
        """Without Slurm's or CUDA's variables; those that are None are taken out."""
        mine = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "HYLO", "CUDA", "RDZV")) and k != "NPROC_PER_NODE"
        }
        mine |= {
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{mine['PATH']}", "RECORD": str(self.folder / "record"),
            "HYLO_ROOT": str(self.root), "HYLO_PYTHON": str(self.folder / "bin" / "torchrun"),
        }  # fmt: skip
        return {k: v for k, v in (mine | changes).items() if v is not None}

    def run(self, *command: str | Path, cwd: Path = ROOT, **changes: str | None) -> Ran:
        """Run a script to its end."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", *map(str, command)],
            env=self.environment(**changes), cwd=cwd, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        return Ran(done.returncode, done.stdout, done.stderr, self.recorded())

    def recorded(self) -> dict[str, list[str]]:
        """Arguments that each fake was started with."""
        files = (self.folder / "record").iterdir()
        return {file.name: file.read_text().split("\0")[:-1] for file in files if file.name not in ("pwd", "starts.txt")}


def wait_for_torchrun(cluster: Cluster, script: subprocess.Popen) -> None:
    """Wait until the script has come to start torchrun."""
    deadline = time.monotonic() + 120
    while "torchrun" not in cluster.recorded():
        assert script.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def signalled(cluster: Cluster, environment: dict[str, str], number: int, *words: str) -> tuple[int, str, str]:
    """(exit status, output, error) of the stage's script, which gets a signal once it has come to start torchrun."""
    with running(
        ["bash", STAGE, *words], env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # where the tests run in the background it is ignored
    ) as script:  # fmt: skip
        wait_for_torchrun(cluster, script)
        script.send_signal(number)
        output, error = script.communicate(timeout=120)
    return script.returncode, output, error


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


STAGE = ROOT / "slurm" / "stage2_ctx8k.sh"


@pytest.mark.parametrize(
    ("changes", "nodes", "cpus"),
    [
        ({}, 2, "64"),
        ({"SLURM_NNODES": None, "SLURM_JOB_NUM_NODES": "2"}, 2, "64"),
        ({"SLURM_NNODES": None, "HOSTS": "3"}, 3, "64"),
        ({"SLURM_JOB_NODELIST": None, "SLURM_NODELIST": "node[1-2]"}, 2, "64"),
        ({"SLURM_JOB_ID": None, "SLURM_JOBID": "1234"}, 2, "64"),
        ({"SLURM_CPUS_ON_NODE": None}, 2, None),
        ({"SLURM_CPUS_ON_NODE": "16(x2)"}, 2, "16"),
        ({"SLURM_CPUS_PER_TASK": "32"}, 2, "32"),
        ({"SLURM_SUBMIT_DIR": None, "SLURM_GPUS_ON_NODE": "gpu:8"}, 2, "64"),
        ({"SLURM_NNODES": None, "HOSTS": "1"}, 1, "64"),
        ({"SLURM_NNODES": "1", "SLURM_JOB_NODELIST": None}, 1, "64"),
    ],
)
def test_nodes_meet_whatever_slurm_calls_its_variables(cluster, changes, nodes, cpus):
    ran = cluster.run(STAGE, **(JOB | changes))
    assert (ran.code, ran.error) == (0, "")
    assert ran.option("nodes", "srun") == str(nodes) and ran.option("cpus-per-task", "srun") == cpus
    meeting = ("2" if nodes == 2 else str(nodes), "node1:21234", "1234.0") if nodes > 1 else (None, None, None)
    assert tuple(ran.option(name) for name in ("nnodes", "rdzv-endpoint", "rdzv-id")) == meeting
    assert ran.option("nproc-per-node") == "8"
    assert ran.option("output") == str(cluster.root / "stage2_ctx8k")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_NNODES": "1-4"}, "SLURM_NNODES=1-4 is not a number of nodes, e.g. SLURM_NNODES=2"),
        ({"SLURM_JOB_NODELIST": None}, "SLURM_JOB_NODELIST does not name the nodes"),
        ({"SLURM_NNODES": None, "SLURM_JOB_NODELIST": None}, "SLURM_JOB_NODELIST does not name the nodes"),
        ({"SLURM_JOB_NODELIST": "rack7"}, "does not understand SLURM_JOB_NODELIST=rack7"),
        ({"SLURM_JOB_ID": "12_3"}, "SLURM_JOB_ID=12_3 is not a number"),
        ({"SLURM_GPUS_ON_NODE": "all"}, "SLURM_GPUS_ON_NODE=all is no number of GPUs; set NPROC_PER_NODE"),
        ({"NPROC_PER_NODE": "auto"}, "NPROC_PER_NODE=auto is no number"),
        ({"HYLO_PYTHON": "/nowhere/python"}, "HYLO_PYTHON=/nowhere/python cannot be run"),
        ({"MODEL": "/nowhere"}, "there is no /nowhere/hylo.json: set HYLO_ROOT, or MODEL"),
        ({"TEACHER": "/nowhere"}, "there is no /nowhere/hylo.json: set HYLO_ROOT, or TEACHER"),
        ({"DATA": "/nowhere"}, "there is no /nowhere/data.json: set HYLO_ROOT, or DATA"),
        ({"RECIPE": "/nowhere.yaml"}, "RECIPE=/nowhere.yaml is not a file"),
        ({"OUTPUT": "~someone/runs"}, "OUTPUT=~someone/runs: write another user's home"),
        ({"OUTPUT": "/dev/null/run"}, "OUTPUT=/dev/null/run cannot be made"),
    ],
)
def test_what_cannot_be_understood_is_said_in_a_sentence(cluster, changes, message):
    ran = cluster.run(STAGE, **(JOB | changes))
    assert ran.code == 2 and message in ran.error and "unbound" not in ran.error
    assert ran.output == "" and "torchrun" not in ran.arguments


@pytest.mark.parametrize(
    ("changes", "processes"),
    [
        ({"SLURM_GPUS_ON_NODE": "4"}, 4),
        ({"SLURM_GPUS_ON_NODE": "gpu:8"}, 8),
        ({"SLURM_GPUS_ON_NODE": "gpu:h100:08"}, 8),
        ({"SLURM_GPUS_ON_NODE": "gpu:h100:8(IDX:0-3,4-7)"}, 8),
        ({"SLURM_GPUS_ON_NODE": "gpu:a100:2,gpu:h100:4"}, 6),
        ({"SLURM_GPUS_ON_NODE": "gpu:1g.10gb:3"}, 3),
        ({"SLURM_GPUS_ON_NODE": "0,1,2"}, 3),
        ({"SLURM_GPUS_ON_NODE": "0-3,6"}, 5),
        ({"SLURM_GPUS_ON_NODE": "0"}, 1),
        ({"SLURM_GPUS_PER_NODE": "h200:2"}, 2),
        ({"SLURM_GPUS_ON_NODE": "8", "NPROC_PER_NODE": "2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "3"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "GPU-5a, GPU-6b"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 1),
        ({}, 4),
    ],
)
def test_one_process_a_gpu_in_every_spelling(cluster, changes, processes):
    ran = cluster.run(ROOT / "slurm" / "node.sh", "train", HYLO_STOP_FILE=str(cluster.folder / "stop"), **changes)
    assert (ran.code, ran.error) == (0, "") and ran.option("nproc-per-node") == str(processes)


@pytest.mark.parametrize("found_by", ["record", "submit_dir", "submit_dir/slurm", "HYLO_REPOSITORY", "nothing"])
def test_a_copy_in_the_spool_finds_the_repository(cluster, found_by):
    repository, spool = cluster.folder / "my clone", cluster.folder / "spool"
    spool.mkdir()
    (repository / "megatron_hylo").mkdir(parents=True)
    (repository / "slurm").symlink_to(ROOT / "slurm")
    (repository / "megatron_hylo" / "recipes").symlink_to(ROOT / "megatron_hylo" / "recipes")
    changes = {
        "record": {"COMMAND": f"{repository}/slurm/{STAGE.name}"},
        "submit_dir": {"SLURM_SUBMIT_DIR": str(repository)},
        "submit_dir/slurm": {"SLURM_SUBMIT_DIR": str(repository / "slurm")},
        "HYLO_REPOSITORY": {"HYLO_REPOSITORY": "~/my clone", "HOME": str(cluster.folder)},
        "nothing": {},
    }[found_by]
    script = spool / "slurm_script"
    script.write_text(STAGE.read_text())
    ran = cluster.run(script, cwd=spool, **(JOB | {"SLURM_SUBMIT_DIR": "/home"} | changes))
    if found_by == "nothing":
        assert ran.code == 2 and "the repository is not found in" in ran.error and "set HYLO_REPOSITORY" in ran.error
    else:
        assert (ran.code, ran.error) == (0, "")
        assert f"{repository}/slurm/node.sh" in ran.arguments["srun"]


def test_all_stages_look_for_the_repository_in_the_same_way():
    blocks = {
        re.search(r"# sbatch runs a copy.*?&& pwd\)\"\n", (ROOT / "slurm" / f"{s}.sh").read_text(), re.S)[0] for s in STAGES
    }
    assert len(blocks) == 1
    assert all(f"\nstage={s}\n" in (ROOT / "slurm" / f"{s}.sh").read_text() for s in STAGES)


@pytest.mark.parametrize(
    ("arguments", "changes", "model", "teacher"),
    [
        ([], {}, "stage1_ild/model", "models/llama3.1-8b"),
        (["--teacher_store=/s"], {}, "stage1_ild/model", None),
        (["--teacher_store", "/s"], {"TEACHER": "models/llama3.1-8b"}, "stage1_ild/model", "models/llama3.1-8b"),
        (["--teacher_address=host:1"], {}, "stage1_ild/model", None),
        (["--teacher_store=null"], {}, "stage1_ild/model", "models/llama3.1-8b"),
        (["--stage", "pretrain"], {}, "stage1_ild/model", None),
        (["--stage=pretrain", "--scratch=smollm2-135m"], {}, None, None),
        ([], {"RECIPE": "stage: 'distil'\nteacher_store: /s  # made before\n"}, "stage1_ild/model", None),
        ([], {"RECIPE": "stage: distil\nteacher_store: null\n"}, "stage1_ild/model", "models/llama3.1-8b"),
        ([], {"RECIPE": 'stage: "pretrain"\nscratch: smollm2-135m\n'}, None, None),
    ],
)
def test_only_models_that_the_run_needs_are_asked_for(cluster, arguments, changes, model, teacher):
    if "RECIPE" in changes:
        (cluster.root / "mine.yaml").write_text(changes["RECIPE"])
        changes = {"RECIPE": "mine.yaml"}
    if teacher is None:
        (cluster.root / "models/llama3.1-8b/hylo.json").unlink()
    if model is None:
        (cluster.root / "stage1_ild/model/hylo.json").unlink()
    ran = cluster.run(STAGE, *arguments, cwd=cluster.root, **changes)
    assert (ran.code, ran.error) == (0, "")
    assert ran.option("model") == (model and str(cluster.root / model))
    assert ran.option("teacher") == (teacher and str(cluster.root / teacher))
    assert ran.arguments["torchrun"][len(ran.arguments["torchrun"]) - len(arguments) :] == arguments


@pytest.mark.parametrize("argument", ["--output=o", "--model", "--teacher=t", "--data"])
def test_paths_are_given_by_variables_alone(cluster, argument):
    ran = cluster.run(STAGE, argument)
    name = argument.strip("-").split("=")[0].upper()
    assert ran.code == 2 and f"{argument}: give this script the variable {name}, e.g. {name}=/shared" in ran.error


def test_home_and_relative_paths_become_absolute(cluster):
    ran = cluster.run(STAGE, cwd=cluster.folder, HYLO_ROOT="my runs/", OUTPUT="~/of mine/", HOME=str(cluster.folder))
    assert (ran.code, ran.error) == (0, "")
    assert ran.option("output") == f"{cluster.folder}/of mine" and (cluster.folder / "of mine").is_dir()
    assert ran.option("data") == f"{cluster.root}/data/mix"


def test_each_array_task_has_an_output_of_its_own_and_is_requeued_alone(cluster):
    task = {"SLURM_ARRAY_JOB_ID": "1234", "SLURM_ARRAY_TASK_ID": "3", "SLURM_NNODES": "1"}
    for requeued, code in (("0", 0), ("1", 3)):
        environment = cluster.environment(**(JOB | task | {"UNTIL_ASKED": "yes", "REQUEUE_EXIT": requeued}))
        status, output, error = signalled(cluster, environment, signal.SIGUSR1)
        assert status == code, error
        assert cluster.recorded()["scontrol"] == ["requeue", "1234_3"]
        assert ("submit it again" in error) == bool(code)
        ran = Ran(code, output, error, cluster.recorded())
        assert ran.option("output") == str(cluster.root / "stage2_ctx8k_3")
        assert f"stopped at {cluster.root}/stage2_ctx8k_3/checkpoints/step_00000001" in output
        (cluster.folder / "record" / "torchrun").unlink()
        for file in (cluster.root / "stage2_ctx8k_3").rglob("manifest.json"):
            file.unlink()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_job_that_is_cancelled_saves_and_stays_out_of_the_queue(cluster, number):
    environment = cluster.environment(**(JOB | {"SLURM_NNODES": "1", "UNTIL_ASKED": "yes"}))
    status, output, _ = signalled(cluster, environment, number)
    assert status == 3 and "checkpoints/step_00000001: run the same command to resume" in output
    assert "scontrol" not in cluster.recorded() and not (cluster.root / "stage2_ctx8k" / "stop_requested").exists()


@pytest.mark.parametrize("writes", [False, True])
def test_a_finished_run_that_is_extended_is_requeued_until_its_next_result(cluster, writes):
    model = cluster.root / "stage2_ctx8k" / "model"
    model.mkdir(parents=True)
    (model / "manifest.json").write_text("of the shorter run")
    changes = JOB | {"SLURM_NNODES": "1", "UNTIL_ASKED": "yes"} | ({"WRITES": str(model)} if writes else {})
    status, output, _ = signalled(cluster, cluster.environment(**changes), signal.SIGUSR1, "--extend_tokens", "9")
    assert status == 0
    assert ("scontrol" in cluster.recorded(), "back into the queue" in output) == (not writes, not writes)


@pytest.mark.parametrize(
    ("code", "starts", "state"),
    [(1, 3, "IDLE"), (137, 3, "IDLE"), (1, 1, "DOWN*"), (1, 1, "a step stays"), (2, 1, "IDLE"), (3, 1, "IDLE")],
)
def test_a_failure_is_tried_again_a_few_times_and_bad_input_never(cluster, code, starts, state):
    broken = {"STEP_STAYS": "1"} if state == "a step stays" else {"STATE": state}
    ran = cluster.run(STAGE, **(JOB | broken | {"FAILS": str(code), "MAX_RETRIES": "2"}))
    requeued = state != "IDLE"
    assert ran.code == (0 if requeued else code) and ("scontrol" in ran.arguments) == requeued
    assert (cluster.folder / "record" / "starts.txt").read_text().count("start") == starts
    events = [json.loads(line) for line in (cluster.root / "stage2_ctx8k" / "jobs.jsonl").read_text().splitlines()]
    last = "retried" if requeued else {2: "failed", 3: "stopped"}.get(code, "failed")
    assert [e["event"] for e in events] == ["started", *["retried", "started"] * (starts - 1), last]
    assert (events[-1]["job"], events[-1]["code"], events[-1]["nodes"]) == ("1234", code, "node[1-2]")


def test_a_job_stopped_before_its_first_checkpoint_is_requeued_until_max_requeues(cluster):
    changes = JOB | {"SLURM_NNODES": "1", "UNTIL_ASKED": "without a checkpoint", "MAX_REQUEUES": "2"}
    codes = []
    for _ in range(3):
        status, _, error = signalled(cluster, cluster.environment(**changes), signal.SIGUSR1)
        codes.append(status)
        (cluster.folder / "record" / "torchrun").unlink()
    assert codes == [0, 0, 1] and "stopped 3 times before a checkpoint was saved (MAX_REQUEUES=2)" in error


def test_a_job_without_srun_runs_on_one_node_and_says_so(cluster):
    (cluster.folder / "bin" / "srun").unlink()
    system = cluster.folder / "system"  # this machine's commands without its Slurm's, if it has one
    system.mkdir()
    for place in ("/usr/bin", "/bin"):
        for file in Path(place).iterdir():
            if file.name != "srun" and not (system / file.name).exists():
                (system / file.name).symlink_to(file)
    path = f"{cluster.folder / 'bin'}{os.pathsep}{system}"
    ran = cluster.run(STAGE, **(JOB | {"SLURM_NNODES": "1", "PATH": path}))
    assert ran.code == 0 and "no srun here" in ran.error and ran.option("nproc-per-node") == "8"
    ran = cluster.run(STAGE, **(JOB | {"PATH": path}))
    assert ran.code == 2 and "there is no srun here to start on them" in ran.error


@pytest.mark.parametrize("image", ["nvcr.io#nvidia/hylo:1", "/shared/hylo.sif"])
def test_a_container_has_the_folders_of_the_run_and_the_interpreter(cluster, image):
    apptainer = cluster.folder / "bin" / "apptainer"
    body = 'printf "%s\\0" "$@" >"$RECORD/apptainer"; while [[ "$1" != bash ]]; do shift; done; exec "$@"'
    apptainer.write_text(f"#!/usr/bin/env bash\n{body}\n")
    apptainer.chmod(0o755)
    ran = cluster.run(
        STAGE, **(JOB | {"CONTAINER_IMAGE": image, "CONTAINER_MOUNTS": "/data:/data", "NETWORK_INTERFACE": "ib0"})
    )
    assert (ran.code, ran.error) == (0, "")
    own = f"{cluster.root}:{cluster.root},{cluster.root}/stage2_ctx8k:{cluster.root}/stage2_ctx8k,{ROOT}:{ROOT},/data:/data"
    if image.endswith(".sif"):
        assert ran.arguments["apptainer"][:5] == ["exec", "--nv", "--bind", own, image]
    else:
        assert ran.option("container-image", "srun") == image and ran.option("container-mounts", "srun") == own
    assert ran.option("output") == str(cluster.root / "stage2_ctx8k")


def test_the_run_folder_has_a_script_that_submits_it_again(cluster):
    ran = cluster.run(STAGE, "--optimizer.lr=1e-4", **(JOB | {"TEACHER": "models/llama3.1-8b"}), cwd=cluster.root)
    run = cluster.root / "stage2_ctx8k"
    script = run / "submit.slurm"
    recipe = ROOT / "megatron_hylo" / "recipes" / "stage2_ctx8k_llama3.2-1b.yaml"
    assert ran.code == 0 and (run / "recipe.yaml").read_text() == recipe.read_text()
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash" and "#SBATCH --nodes=2" in lines and "#SBATCH --partition=gpu" in lines
    assert "#SBATCH --signal=B:USR1@300" in lines and "#SBATCH --gpus-per-node=8" not in lines
    again = cluster.run(script, cwd=cluster.folder, HYLO_ROOT=None, **JOB)
    assert again.code == 0 and again.arguments["torchrun"][-1] == "--optimizer.lr=1e-4"
    for name in ("data", "model", "teacher", "output"):
        assert again.option(name) == ran.option(name)
    assert again.option("config") == str(run / "recipe.yaml")
    elsewhere = cluster.run(script, OUTPUT=str(cluster.folder / "other"), **JOB)
    assert elsewhere.option("output") == str(cluster.folder / "other")
    assert (cluster.folder / "other" / "submit.slurm").is_file()


def test_a_chain_is_submitted_whole_or_not_at_all(cluster):
    chain = ROOT / "slurm" / "submit_chain.sh"
    ran = cluster.run(chain, "stage1_ild", "stage3_ctx64k")
    assert ran.code == 2 and "models/llama3.2-1b-4mla12gdn/hylo.json" in ran.error and "nothing was submitted" in ran.error
    for name in ("llama3.2-1b", "llama3.2-1b-4mla12gdn"):
        (cluster.root / "models" / name).mkdir()
        (cluster.root / "models" / name / "hylo.json").write_text("{}")
    for stages, changes, message in (
        ([], {}, "usage:"),
        (["stage1_ild", "stage9"], {}, "there is no stage stage9; choose out of stage1_ild.sh"),
        (["common"], {}, "there is no stage common"),
        (["stage1_ild", "stage2_ctx8k"], {"OUTPUT": "/o"}, "OUTPUT=/o would be that of all 2 stages; set OUTPUT_1 to OUTPUT_2"),
        (["stage1_ild", "stage2_ctx8k"], {"MODEL_3": "/o"}, "MODEL_3=/o is of no stage: there are 2"),
        (["stage1_ild", "stage2_ctx8k"], {"TEACHER_2": "/o"}, "there is no /o/hylo.json"),
        (["stage1_ild", "stage1_ild"], {}, "set OUTPUT_2"),
    ):
        ran = cluster.run(chain, *stages, **changes)
        assert ran.code == 2 and message in ran.error and "sbatch" not in ran.arguments
    shutil.rmtree(cluster.root / "stage1_ild")  # stage 3's model is stage 1's result, which is not there yet
    ran = cluster.run(chain, "stage1_ild", "stage3_ctx64k.sh", cwd=cluster.folder, CDPATH=str(ROOT))
    assert (ran.code, ran.output) == (0, "stage1_ild: job 7\nstage3_ctx64k: job 7\n")
    scripts = [word for word in ran.arguments["sbatch"] if word.endswith(".sh")]
    assert scripts == [str(ROOT / "slurm" / f"{name}.sh") for name in ("stage1_ild", "stage3_ctx64k")]
    assert "--dependency=afterok:7" in ran.arguments["sbatch"]
    assert ran.arguments["paths"] == ["", "", "", f"{cluster.root}/stage1_ild/model", "", ""]
    assert not (cluster.root / "stage1_ild").exists()  # checked, not begun
    (cluster.folder / "record" / "paths").unlink()
    mine = {"MODEL": "my hybrid", "TEACHER_2": f"{cluster.root}/models/llama3.1-8b", "OUTPUT_1": "one", "OUTPUT_2": "two"}
    shutil.copytree(cluster.root / "models" / "llama3.2-1b", cluster.folder / "my hybrid")
    ran = cluster.run(chain, "stage1_ild", "stage2_ctx8k", cwd=cluster.folder, **mine)
    assert (ran.code, ran.error) == (0, "")
    second = [f"{cluster.folder}/one/model", mine["TEACHER_2"], "two"]
    assert ran.arguments["paths"] == ["my hybrid", "", "one", *second]
