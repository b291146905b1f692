#!/usr/bin/env bash
# One node's part of a run: torchrun over its GPUs. Started by common.sh, by itself or through srun; arguments go to `hylo`.
set -euo pipefail

gpus="$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)"
processes="${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-$gpus}}"
((processes > 0)) || processes=1

threads=$(($(nproc) / processes))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads < 1 ? 1 : threads > 8 ? 8 : threads))}"

rendezvous=(--standalone)
if [[ -n "${RDZV_ENDPOINT:-}" ]]; then
    # A requeued job keeps its id; its restart count tells its rendezvous from the earlier one.
    rendezvous=(--nnodes="$SLURM_NNODES" --rdzv-backend=c10d --rdzv-endpoint="$RDZV_ENDPOINT"
        --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}")
fi

# torchrun would end the workers at SIGTERM, SIGINT or SIGHUP: it is started ignoring them, which --signals-to-handle keeps
# it doing. The workers, its only children, inherit that until they install handlers of their own; so they are asked again.
(
    trap '' USR1 TERM INT HUP
    exec "$HYLO_PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node="$processes" \
        --signals-to-handle=SIGQUIT -m megatron_hylo.cli "$@"
) &
torchrun=$!
asked="" seconds=0
trap 'asked=yes' USR1 TERM INT HUP
while kill -0 "$torchrun" 2>/dev/null; do
    if [[ -n "$asked" || -e "$HYLO_STOP_FILE" ]]; then
        ((seconds++ % 10)) || pkill -USR1 -P "$torchrun" || true
    fi
    sleep 1 || true
done
wait "$torchrun"
