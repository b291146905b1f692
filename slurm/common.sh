# shellcheck shell=bash
# Sourced by the stage scripts after they have set MODEL, TEACHER, DATA, OUTPUT and RECIPE. Runs `hylo train` on the nodes
# of the Slurm allocation, or on this machine where there is none, and ends well when it has to stop early.
#
# Stopping. `hylo train` answers SIGUSR1 by finishing its step and saving a checkpoint, on all ranks once one is asked.
# Only the workers may get that signal. torchrun dies of SIGUSR1, and answers SIGTERM, SIGINT and SIGHUP by killing the
# workers after 30 s at most; srun and scancel signal every process of a step, with it the one in which Megatron-Core
# collects a checkpoint that is being written. So this script asks by making a file, and node.sh, on each node, signals
# the workers there.
#   SIGUSR1  from Slurm before the time limit (#SBATCH --signal), and on preemption where the cluster has
#            PreemptParameters=send_user_signal: save, and put the job back into the queue.
#   SIGTERM, SIGINT, SIGHUP  from scancel, Ctrl-C, a closed terminal: save as far as time allows, and end.
# A job that is started again goes on from OUTPUT's newest checkpoint, so submitting it anew by hand does as well.
set -euo pipefail

slurm_dir="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
repository="$(dirname "$slurm_dir")"
if [[ -z "${HYLO_PYTHON:-}" ]]; then
    HYLO_PYTHON=python
    [[ ! -x "$repository/.venv/bin/python" ]] || HYLO_PYTHON="$repository/.venv/bin/python" # `make install`
fi
export HYLO_PYTHON
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron-Core relies on one queue to overlap tensor-parallel communication
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$HYLO_ROOT/cache/triton}" # shared: a requeued job may land on other nodes
export TRITON_CACHE_AUTOTUNING="${TRITON_CACHE_AUTOTUNING:-1}"         # autotuning takes minutes at the first step
export TOKENIZERS_PARALLELISM=false

for file in "$MODEL/hylo.json" "$TEACHER/hylo.json" "$DATA/data.json" "$RECIPE"; do
    if [[ ! -f "$file" ]]; then
        echo "error: there is no $file; set HYLO_ROOT, or MODEL, TEACHER, DATA and RECIPE one by one" >&2
        exit 2
    fi
done

# Folder of the newest finished checkpoint; nothing where there is none.
newest_checkpoint() {
    local manifest newest=""
    for manifest in "$OUTPUT"/checkpoints/step_*/manifest.json; do
        [[ ! -f "$manifest" ]] || newest="$(dirname "$manifest")"
    done
    echo "$newest"
}

finished() { [[ -f "$OUTPUT/model/manifest.json" ]]; }

launch=(bash "$slurm_dir/node.sh")
if [[ -n "${SLURM_JOB_ID:-}" ]]; then
    if ((SLURM_NNODES > 1)); then
        host="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
        export RDZV_ENDPOINT="$host:$((20000 + SLURM_JOB_ID % 20000))"
    fi
    # --wait: should one node fail, the others would sit in a collective until it times out.
    launch=(srun --nodes="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}"
        --wait=60 "${launch[@]}")
fi

mkdir -p "$OUTPUT"
export HYLO_STOP_FILE="$OUTPUT/stop_requested"
rm -f "$HYLO_STOP_FILE"
before="$(newest_checkpoint)"
asked=""
trap 'asked=requeue; touch "$HYLO_STOP_FILE"' USR1
trap 'asked=end; touch "$HYLO_STOP_FILE"' TERM INT HUP
"${launch[@]}" train --config "$RECIPE" --model "$MODEL" --teacher "$TEACHER" --data "$DATA" --output "$OUTPUT" "$@" &
child=$!
while kill -0 "$child" 2>/dev/null; do
    wait "$child" || true # returns early each time a signal came
done
code=0
wait "$child" || code=$?
rm -f "$HYLO_STOP_FILE"

# torchrun's exit status is 1 whatever the workers' was, so what is on disk decides.
if finished; then
    exit 0
elif [[ -z "$asked" ]]; then
    exit "$code"
elif [[ "$(newest_checkpoint)" == "$before" ]]; then
    echo "error: stopped before a checkpoint was saved; allow more time (--time, or --signal=B:USR1@SECONDS earlier)" >&2
    exit 1 # not requeued: it would stop at the same place for ever
elif [[ "$asked" == requeue && -n "${SLURM_JOB_ID:-}" ]]; then
    echo "stopped at $(newest_checkpoint): back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
else
    echo "stopped at $(newest_checkpoint): run the same command to resume"
    exit 3
fi
