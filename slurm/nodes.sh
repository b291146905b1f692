# shellcheck shell=bash
# Sourced by common.sh inside a Slurm job: `launch` becomes an srun over the job's nodes, which meet at the first of them.
# shellcheck disable=SC2154  # container and launch are of common.sh
# What Slurm sets differs by version, site and container, so each variable has a second source or a sentence.
[[ "${job:?}" =~ ^[0-9]+$ ]] || fail "SLURM_JOB_ID=$job is not a number, e.g. SLURM_JOB_ID=1234"
list="${SLURM_JOB_NODELIST:-${SLURM_NODELIST:-}}"
nodes="${SLURM_NNODES:-${SLURM_JOB_NUM_NODES:-}}"
[[ -z "$nodes" || "$nodes" =~ ^[1-9][0-9]*$ ]] || fail "SLURM_NNODES=$nodes is not a number of nodes, e.g. SLURM_NNODES=2"
host=""
if [[ "$nodes" != 1 ]]; then
    [[ -n "$list" ]] ||
        fail "job $job (SLURM_NNODES=$nodes): SLURM_JOB_NODELIST does not name the nodes, e.g. SLURM_JOB_NODELIST=node[01-02]"
    # Not through a pipe to head: scontrol may be killed by its end, and pipefail would end this script without a word.
    hosts="$(scontrol show hostnames "$list")" || hosts=""
    [[ -n "$hosts" ]] || fail "scontrol show hostnames does not understand SLURM_JOB_NODELIST=$list, e.g. node[01-02]"
    host="${hosts%%$'\n'*}"
    [[ -n "$nodes" ]] || nodes="$(wc -l <<<"$hosts")"
    if ((nodes > 1)) && ! getent hosts "$host" >/dev/null; then # a name of Slurm's alone, as in clouds
        address="$(scontrol show node "$host" 2>/dev/null | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
        host="${address:-$host}"
    fi
fi
if ((nodes > 1)); then
    # A requeued job keeps its id; its restart count tells its rendezvous from the earlier one.
    export NNODES="$nodes" RDZV_ENDPOINT="$host:$((20000 + job % 20000))" RDZV_ID="$job.${SLURM_RESTART_COUNT:-0}"
fi
if command -v srun >/dev/null; then
    cpus="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-}}" # not given where unknown: srun takes the job's
    # --export: a job submitted without its environment still hands this one on. --wait: should one node fail, the others
    # would sit in a collective until it times out.
    launch=(srun --nodes="$nodes" --ntasks-per-node=1 ${cpus:+--cpus-per-task="${cpus%%(*}"} --export=ALL --wait=60
        "${container[@]}" "${launch[@]}")
elif ((nodes > 1)); then
    fail "job $job has $nodes nodes and there is no srun here to start on them; inside a container, bring Slurm's commands in"
else
    echo "no srun here: starting on this node alone" >&2
fi
