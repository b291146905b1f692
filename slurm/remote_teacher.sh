#!/usr/bin/env bash
# A stage whose teacher is on nodes of its own: one heterogeneous job, the student's nodes and, after `hetjob`, the teacher's.
# Submit:  HYLO_ROOT=/shared/hylo STAGE=stage3_ctx64k sbatch slurm/remote_teacher.sh [--train_tokens N ...]
# Variables and arguments are the stage script's. TEACHER_OPTIONS are those of `hylo serve-teacher`, by default one copy of the
# teacher over all GPUs of its node. Both groups are requeued together.
#SBATCH --job-name=hylo-remote_teacher
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
#SBATCH hetjob
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

stage="${STAGE:-stage2_ctx8k}"
[[ "${SLURM_HET_SIZE:-}" == 2 ]] || fail "this script is a heterogeneous job of two groups: submit it with sbatch"
record="$(scontrol show job "${SLURM_JOB_ID:-}" 2>/dev/null || true)"
record="${record#*Command=}"
for HYLO_REPOSITORY in "${HYLO_REPOSITORY:-}" "${record%%"/slurm/remote_teacher.sh"*}" "${SLURM_SUBMIT_DIR:-$PWD}"; do
    [[ ! -f "$HYLO_REPOSITORY/slurm/$stage.sh" ]] || break
done
export HYLO_REPOSITORY
[[ -f "$HYLO_REPOSITORY/slurm/$stage.sh" ]] || fail "STAGE=$stage is no stage, or HYLO_REPOSITORY does not name the repository"
slurm_dir="$HYLO_REPOSITORY/slurm"
HYLO_ROOT="${HYLO_ROOT:-$PWD/runs}"
teacher="${TEACHER:-$HYLO_ROOT/models/llama3.1-8b}"
[[ -f "$teacher/hylo.json" ]] || fail "there is no $teacher/hylo.json: set HYLO_ROOT, or TEACHER"
if [[ -z "${HYLO_PYTHON:-}" ]]; then
    HYLO_PYTHON=python
    [[ ! -x "$HYLO_REPOSITORY/.venv/bin/python" ]] || HYLO_PYTHON="$HYLO_REPOSITORY/.venv/bin/python"
fi
export HYLO_PYTHON HYLO_ROOT PYTHONPATH="$HYLO_REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"

host="$(scontrol show hostnames "${SLURM_JOB_NODELIST_HET_GROUP_1:?}")"
host="${host%%$'\n'*}"
if ! getent hosts "$host" >/dev/null; then # a name of Slurm's alone, as in clouds
    host="$(scontrol show node "$host" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
fi
port=$((25000 + SLURM_JOB_ID % 5000))
HYLO_TEACHER_SECRET="${HYLO_TEACHER_SECRET:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}"
export HYLO_TEACHER_SECRET

read -ra options <<<"${TEACHER_OPTIONS:---tensor_model_parallel_size ${SLURM_GPUS_PER_NODE:-8} --sequence_parallel}"
HYLO_STOP_FILE=/dev/null/never srun --het-group=1 --ntasks-per-node=1 --export=ALL \
    bash "$slurm_dir/node.sh" serve-teacher "$teacher" "$host:$port" "${options[@]}" &
server=$!
until (exec 3<>"/dev/tcp/$host/$port") 2>/dev/null; do
    kill -0 "$server" 2>/dev/null || { wait "$server"; exit 1; }
    sleep 2
done

TEACHER="" bash "$slurm_dir/$stage.sh" --teacher_address="$host:$port" "$@" &
student=$!
trap 'kill -USR1 "$student"' USR1
trap 'kill -TERM "$student"' TERM INT HUP
while kill -0 "$student" 2>/dev/null; do
    wait "$student" || true # returns early each time a signal came
done
code=0
wait "$student" || code=$?
kill -TERM "$server" 2>/dev/null || true
exit "$code"
