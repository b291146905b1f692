#!/usr/bin/env bash
# One node's part of a run: torchrun over its GPUs, or one process for a sweep's cell. Started by common.sh, by itself or through
# srun; arguments go to `hylo`.
# Several nodes without Slurm: RDZV_ENDPOINT=HOST:PORT NNODES=2 RDZV_ID=NAME, the same on each.
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

if [[ -n "${MODULES:-}" ]] && ! command -v "${HYLO_PYTHON:?}" >/dev/null; then # a node's shell may not have them yet
    for file in /etc/profile.d/{lmod,z00_lmod,modules}.sh; do
        # shellcheck disable=SC1090
        command -v module >/dev/null || [[ ! -f "$file" ]] || source "$file"
    done
    # shellcheck disable=SC2086
    module load $MODULES || fail "MODULES=$MODULES cannot be loaded on $(uname -n)"
fi

# Number of GPUs in a value of Slurm's: 8, gpu:8, h100:8, gpu:h100:8(IDX:0-7), a sum such as a100:4,h100:4, or a list such
# as 0,1,2 or 0-7.
slurm_gpus() {
    local value="$1" entry total=0
    local -a entries
    while [[ "$value" == *\(*\)* ]]; do
        value="${value%%\(*}${value#*\)}"
    done
    IFS=, read -ra entries <<<"$value"
    for entry in "${entries[@]}"; do
        if [[ "$entry" =~ ^([0-9]+)-([0-9]+)$ ]]; then
            total=$((total + 10#${BASH_REMATCH[2]} - 10#${BASH_REMATCH[1]} + 1))
        elif [[ "$entry" =~ ^[0-9]+$ ]]; then
            total=$((total + (${#entries[@]} > 1 ? 1 : 10#$entry)))
        elif [[ "$entry" =~ ^[^:]*[A-Za-z].*:([0-9]+)$ ]]; then
            total=$((total + 10#${BASH_REMATCH[1]}))
        else
            return 1
        fi
    done
    echo "$total"
}

slurm="${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-}}"
if [[ -n "${NPROC_PER_NODE:-}" ]]; then
    processes="$NPROC_PER_NODE"
    [[ "$processes" =~ ^[1-9][0-9]*$ ]] || fail "NPROC_PER_NODE=$processes is no number of processes, e.g. NPROC_PER_NODE=8"
elif [[ -n "$slurm" ]]; then
    processes="$(slurm_gpus "$slurm")" ||
        fail "SLURM_GPUS_ON_NODE=$slurm is no number of GPUs; set NPROC_PER_NODE to it, e.g. NPROC_PER_NODE=8"
elif [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then # of the GPUs that nvidia-smi lists, torch sees these
    IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES//[[:space:]]/}"
    processes="${#visible[@]}"
    [[ "${visible[0]:-}" != -* && "${visible[0]:-}" != No* ]] || processes=0 # -1, and Slurm's NoDevFiles
else
    processes="$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)"
fi
((processes > 0)) || processes=1
command -v pkill >/dev/null || fail "there is no pkill on $(uname -n), and stopping needs it: install procps"

threads=$(($(nproc) / processes))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads < 1 ? 1 : threads > 8 ? 8 : threads))}"

rendezvous=(--standalone)
if [[ -n "${RDZV_ENDPOINT:-}" ]]; then
    [[ "${NNODES:-}" =~ ^[1-9][0-9]*$ && -n "${RDZV_ID:-}" ]] ||
        fail "RDZV_ENDPOINT=$RDZV_ENDPOINT needs NNODES and RDZV_ID, the same on each node, e.g. NNODES=2 RDZV_ID=first"
    rendezvous=(--nnodes="$NNODES" --rdzv-backend=c10d --rdzv-endpoint="$RDZV_ENDPOINT" --rdzv-id="$RDZV_ID")
fi

if [[ "$1" == sweep ]]; then # a cell: one process, which any signal ends that it has no handler for
    ((processes == 1)) || fail "a cell of a sweep uses one GPU, and this task has $processes: leave --gpus-per-node out"
    [[ "${SLURM_NNODES:-1}" == 1 ]] || fail "a cell of a sweep uses one node, and this task has $SLURM_NNODES: leave --nodes out"
    trained=()
    ask() { kill -USR1 "$child" || true; }
else
    # torchrun would end the workers at SIGTERM, SIGINT or SIGHUP: it is started ignoring them, which --signals-to-handle keeps
    # it doing. The workers, its only children, inherit that until they install handlers of their own; so they are asked again.
    trained=(-m megatron_hylo.train.launch "${rendezvous[@]}" --nproc-per-node="$processes" --signals-to-handle=SIGQUIT)
    ask() { pkill -USR1 -P "$child" || true; }
fi
(
    trap '' TERM INT HUP
    ((${#trained[@]} == 0)) || trap '' USR1
    exec "$HYLO_PYTHON" "${trained[@]}" -m megatron_hylo.cli "$@"
) &
child=$!
asked="" seconds=0
trap 'asked=yes; touch "$HYLO_STOP_FILE" 2>/dev/null || true' USR1 TERM INT HUP # the file reaches what only starts
while kill -0 "$child" 2>/dev/null; do
    if [[ -n "$asked" || -e "$HYLO_STOP_FILE" ]]; then
        ((seconds++ % 3)) || ask
    fi
    sleep 1 || true
done
wait "$child"
