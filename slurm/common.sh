# shellcheck shell=bash
# Sourced by the stage scripts after they have set what run.sh reads. Runs `hylo train` on the nodes of the Slurm allocation,
# or on this machine where there is none, and ends well when it has to stop early. Variables: docs/cluster.md.
# The scripts that `hylo sweep --slurm` writes source it too, after they have set cell_number, cell_specification, OUTPUT and, of
# the cell's stages in their order, cell_runs (folders) and cell_results (files, all there once it is finished): it runs the cell.
#
# Stopping. `hylo train` answers SIGUSR1 by finishing its step and saving a checkpoint, on all ranks once one is asked; before
# its first step it ends at once. Only the workers may get that signal. torchrun dies of SIGUSR1, and answers SIGTERM, SIGINT
# and SIGHUP by killing the workers after 30 s at most; srun and scancel signal every process of a step, with it the one in
# which Megatron-Core collects a checkpoint that is being written. So this script asks by making a file, and node.sh, on each
# node, signals the workers there.
#   SIGUSR1  from Slurm before the time limit (#SBATCH --signal), and on preemption where the cluster has
#            PreemptParameters=send_user_signal: save, and put the job back into the queue. A run that has not ended after
#            STOP_SECONDS is killed first; it goes on from the checkpoint before.
#   SIGTERM, SIGINT, SIGHUP  from scancel, Ctrl-C, a closed terminal: save as far as time allows, and end. A job that Slurm
#            preempts by SIGTERM goes back into the queue.
# Failing. After exit status 2, bad input, the job ends. After any other failure the run is started again, in the same
# allocation or, where a node of it is down, by the queue. MAX_RETRIES bounds failures, and MAX_REQUEUES stops, that follow one
# another without a new checkpoint between them.
# A job that is started again goes on from OUTPUT's newest checkpoint, so submitting it anew by hand does as well. A finished
# run is trained longer with the argument --extend_tokens N.
set -euo pipefail

# A mistake in what was given: what, and what to set instead.
fail() {
    echo "error: $*" >&2
    exit 2
}

# The path $2 of the variable $1 as an absolute one; a ~ that quotes kept from the shell is the home folder.
absolute() {
    local path="${2%/}"
    case "$path" in
        \~ | \~/*) path="$HOME${path#\~}" ;;
        \~*) fail "$1=$2: write another user's home folder out, e.g. $1=/home/me/runs" ;;
    esac
    [[ "$path" == /* ]] || path="$PWD/$path"
    printf '%s\n' "${path//\/\///}"
}

# Load MODULES; login shells define the function, others read it from the profile.
load_modules() {
    local file
    [[ -n "$MODULES" ]] || return 0
    for file in /etc/profile.d/{lmod,z00_lmod,modules}.sh; do
        # shellcheck disable=SC1090
        command -v module >/dev/null || [[ ! -f "$file" ]] || source "$file"
    done
    command -v module >/dev/null || fail "MODULES=$MODULES: there is no module command on $(uname -n); leave MODULES empty"
    # shellcheck disable=SC2086
    module load $MODULES || fail "MODULES=$MODULES cannot be loaded on $(uname -n); \`module avail\` lists what there is"
}

# shellcheck source=slurm/site.sh
source "${slurm_dir:?}/site.sh"
HYLO_ROOT="$(absolute HYLO_ROOT "$HYLO_ROOT")"
if [[ -n "${cell_number:-}" ]]; then # of a sweep: one process, which goes through the cell's stages and evaluations
    program=(sweep "${cell_specification:?}" --cell "$cell_number")
    [[ -z "${DRY_RUN:-}" ]] || fail "DRY_RUN=1 is for single runs; hylo sweep $cell_specification --dry_run checks all cells"
else
    # shellcheck source=slurm/run.sh
    source "$slurm_dir/run.sh"
fi

repository="$(dirname "${slurm_dir:?}")"
if [[ -z "$HYLO_PYTHON" ]]; then
    HYLO_PYTHON=python
    made="$repository/.venv/bin/python" # by `make install`
    [[ -n "$CONTAINER_IMAGE" || ! -x "$made" ]] || HYLO_PYTHON="$made"
fi
[[ "$HYLO_PYTHON" != */* ]] || HYLO_PYTHON="$(absolute HYLO_PYTHON "$HYLO_PYTHON")"
load_modules
[[ -n "$CONTAINER_IMAGE" ]] || command -v "$HYLO_PYTHON" >/dev/null ||
    fail "HYLO_PYTHON=$HYLO_PYTHON cannot be run; make install, or e.g. HYLO_PYTHON=/shared/venv/bin/python"
export HYLO_PYTHON MODULES
if [[ -n "$NETWORK_INTERFACE" ]]; then
    export NCCL_SOCKET_IFNAME="$NETWORK_INTERFACE" GLOO_SOCKET_IFNAME="$NETWORK_INTERFACE"
fi
for name in MAX_REQUEUES:5 MAX_RETRIES:2 STOP_SECONDS:240 RETRY_SECONDS:10; do
    value="${name#*:}" name="${name%:*}"
    declare "$name=${!name:-$value}"
    [[ "${!name}" =~ ^[0-9]+$ ]] || fail "$name=${!name} is not a number, e.g. $name=$value"
done
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron-Core relies on one queue to overlap tensor-parallel communication
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$HYLO_ROOT/cache/triton}" # shared: a requeued job may land on other nodes
export TRITON_CACHE_AUTOTUNING="${TRITON_CACHE_AUTOTUNING:-1}"         # autotuning takes minutes at the first step
export TOKENIZERS_PARALLELISM=false

if [[ -n "${HYLO_CHECK_ONLY:-}" ]]; then # asked by submit_chain.sh, which wants the checks above and the run's folder
    printf '%s\n' "$OUTPUT"
    exit 0
fi

inside=() container=()
mounts="$HYLO_ROOT:$HYLO_ROOT,$OUTPUT:$OUTPUT,$repository:$repository${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
if [[ "$CONTAINER_IMAGE" == *.sif ]]; then
    inside=(apptainer exec --nv --bind "$mounts" "$CONTAINER_IMAGE")
elif [[ -n "$CONTAINER_IMAGE" ]]; then
    container=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts" --no-container-remap-root)
    [[ -z "${DRY_RUN:-}" ]] || fail "DRY_RUN=1 needs an interpreter outside of $CONTAINER_IMAGE; set CONTAINER_IMAGE= for it"
fi
if [[ -n "${DRY_RUN:-}" ]]; then # settings, plan and checks, without a job: DRY_RUN=1 bash slurm/STAGE.sh
    asked_for() { sed -n "s/^#SBATCH --$1=//p" "$slurm_dir/${stage:?}.sh"; }
    nodes="${SLURM_NNODES:-${NODES:-$(asked_for nodes)}}" gpus="${NPROC_PER_NODE:-$(asked_for gpus-per-node)}"
    exec "${inside[@]}" "$HYLO_PYTHON" -m megatron_hylo.cli "${program[@]}" "$@" --dry_run --ranks=$((nodes * gpus))
fi

launch=("${inside[@]}" bash "$slurm_dir/node.sh")
job="${SLURM_JOB_ID:-${SLURM_JOBID:-}}"
job_name="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$job}" # an array's number is the whole array's
if [[ -n "$job" ]]; then
    # shellcheck source=slurm/nodes.sh
    source "$slurm_dir/nodes.sh"
fi

((${#container[@]} == 0)) || [[ "${launch[0]}" == srun ]] ||
    fail "CONTAINER_IMAGE=$CONTAINER_IMAGE needs srun with pyxis; submit with sbatch, or give a .sif for apptainer"
mkdir -p "$OUTPUT" || fail "OUTPUT=$OUTPUT cannot be made; e.g. OUTPUT=/shared/hylo/run"
export HYLO_STOP_FILE="$OUTPUT/stop_requested"
# shellcheck source=slurm/supervise.sh
source "$slurm_dir/supervise.sh"
# shellcheck source=slurm/submit_script.sh
[[ -n "${cell_number:-}" ]] || source "$slurm_dir/submit_script.sh"
supervise "${program[@]}" "$@"
