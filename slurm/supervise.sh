# shellcheck shell=bash
# Sourced by common.sh: starts a run, sees it through stops and failures, and keeps what happened in OUTPUT/jobs.jsonl.
# shellcheck disable=SC2154  # launch, job and job_name are of common.sh
jobs="${OUTPUT:?}/jobs.jsonl"

# Folder of the newest finished checkpoint, of a cell's last stage that has one; nothing where there is none.
newest_checkpoint() {
    local run manifest newest=""
    for run in "${cell_runs[@]:-$OUTPUT}"; do
        for manifest in "$run"/checkpoints/step_*/manifest.json; do
            [[ ! -f "$manifest" ]] || newest="$(dirname "$manifest")"
        done
    done
    echo "$newest"
}

# Name of the newest checkpoint: step_N, of a cell STAGE/step_N.
checkpoint_name() {
    local folder stage
    folder="$(newest_checkpoint)"
    stage="${folder%/run/checkpoints/*}"
    if [[ -n "${cell_number:-}" && -n "$folder" ]]; then echo "${stage##*/}/${folder##*/}"; else echo "${folder##*/}"; fi
}

# What tells one result of the run from another; nothing where there is none. A finished run that goes on (--extend_tokens)
# keeps its result until it has the next.
result() {
    local file
    for file in "${cell_results[@]:-$OUTPUT/model/manifest.json}"; do [[ -f "$file" ]] || return 0; done
    cat "${cell_results[@]:-$OUTPUT/model/manifest.json}" | cksum
}

# Append the event $1 (started, finished, requeued, retried, stopped, failed), with the exit status $2, to jobs.jsonl.
record() {
    local form
    form='{"time": "%s", "event": "%s", "job": "%s", "restart": %d, "nodes": "%s", "code": %s, "checkpoint": "%s"}\n'
    # shellcheck disable=SC2059
    printf "$form" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$1" "${job_name:-}" "${SLURM_RESTART_COUNT:-0}" \
        "${SLURM_JOB_NODELIST:-$(uname -n)}" "${2:-null}" "$(checkpoint_name)" >>"$jobs"
}

# Number of events $1 of this job since the run got its newest checkpoint.
without_progress() {
    local line begin end count=0
    begin="\"event\": \"$1\", \"job\": \"$job_name\"" end="\"checkpoint\": \"$(checkpoint_name)\"}"
    while IFS= read -r line; do
        [[ "$line" != *"$begin"*"$end" ]] || count=$((count + 1))
    done <"$jobs"
    echo "$count"
}

# Put the job back into the queue as the event $1 with the exit status $2; ends this script.
requeue() {
    record "$1" "$2"
    scontrol requeue "$job_name" && exit 0
    echo "error: the job could not be put back into the queue: submit it again, it resumes" >&2
    record stopped "$2"
    exit 3
}

# Whether Slurm is preempting this job: then it has sent SIGTERM to make room, and nobody has cancelled the job.
preempted() {
    local about
    about="$(scontrol show job "$job" 2>/dev/null)" || return 1
    [[ "$about" =~ PreemptTime=[0-9] ]]
}

# Whether all nodes of the job answer, so that a step can be started on them again.
nodes_are_up() {
    [[ -n "$job" && -n "${SLURM_JOB_NODELIST:-}" ]] || return 0
    local about
    about="$(scontrol show node "$SLURM_JOB_NODELIST" 2>/dev/null)" || return 1
    [[ ! "$about" =~ State=[A-Z+]*(DOWN|FAIL|NOT_RESPONDING|\*) ]]
}

# Whether the earlier step has left the nodes, so that a new one gets them; Slurm keeps one whose daemon died on a node for ever.
step_is_gone() {
    local seconds
    [[ -n "$job" && "${launch[0]}" == srun ]] || return 0
    for ((seconds = 0; seconds < 30; seconds++)); do
        squeue --noheader --steps --job="$job" --format=%i 2>/dev/null | grep -qx "$job\.[0-9]*" || return 0
        sleep 1 || true
    done
    return 1
}

# End a run that does not answer: its step on all nodes where there is one, else its processes here.
kill_run() {
    local step
    echo "no end $STOP_SECONDS s after the stop was asked for: killing the run; it goes on from $(newest_checkpoint)" >&2
    if [[ "${launch[0]}" == srun ]]; then
        for step in $(squeue --noheader --steps --job="$job" --format=%i); do
            [[ ! "$step" =~ \.[0-9]+$ ]] || scancel --signal=KILL "$step" || true
        done
    else
        pkill -KILL -P "$child" || true # torchrun; its workers end with it
    fi
}

# Run "$@" once; sets code, its exit status.
run_once() {
    local since=""
    rm -f "$HYLO_STOP_FILE"
    [[ -z "$asked" ]] || touch "$HYLO_STOP_FILE"
    "${launch[@]}" "$@" &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        wait "$child" || true # returns early each time a signal came
        [[ "$asked" == requeue ]] || continue
        since="${since:-$SECONDS}"
        while kill -0 "$child" 2>/dev/null && ((SECONDS - since < STOP_SECONDS)); do sleep 1 || true; done
        ! kill -0 "$child" 2>/dev/null || kill_run
        since=$((SECONDS + 60)) # once more after that
    done
    code=0
    wait "$child" || code=$?
    rm -f "$HYLO_STOP_FILE"
}

# Run "$@" to its result, or to where this job has to leave it; ends this script.
supervise() {
    local before result_before again
    asked="" result_before="$(result)"
    trap 'asked=requeue; touch "$HYLO_STOP_FILE"' USR1
    trap 'asked="${asked:-end}"; touch "$HYLO_STOP_FILE"' TERM INT HUP
    if [[ -n "$NODE_CHECK" ]] && ! "${launch[@]}" doctor --node; then # it names the rank
        nodes_are_up || requeue retried 1
        record failed 1
        exit 1
    fi
    while :; do
        before="$(newest_checkpoint)"
        record started
        run_once "$@"
        # The exit status may be that of a worker that ended badly after the result was written: what is on disk decides too.
        if [[ "$(result)" != "$result_before" || ($code -eq 0 && (-n "$result_before" || -z "$asked")) ]]; then
            record finished "$code"
            exit 0
        elif [[ -n "$asked" ]] || { [[ -n "$job" && $code -ne 2 ]] && preempted; }; then # its SIGTERM reaches the steps alone
            stop_here "$before"
        elif [[ $code -eq 2 || $code -eq 3 || $code -eq 130 ]]; then # bad input; asked to stop by someone else
            record "$([[ $code -eq 2 ]] && echo failed || echo stopped)" "$code"
            exit "$code"
        fi
        again="$(without_progress retried)"
        if ((again >= MAX_RETRIES)); then
            record failed "$code"
            echo "error: failed $((again + 1)) times without a new checkpoint (MAX_RETRIES=$MAX_RETRIES): giving up" >&2
            exit "$code"
        fi
        echo "failed with exit status $code: starting again (retry $((again + 1)) of $MAX_RETRIES)" >&2
        { nodes_are_up && step_is_gone; } || requeue retried "$code"
        record retried "$code"
        sleep "$RETRY_SECONDS" || true
        [[ -z "$asked" ]] || stop_here "$before"
    done
}

# After a stop was asked for: back into the queue, or out of it. $1 is the checkpoint that the run had started from.
stop_here() {
    local newest again
    newest="$(newest_checkpoint)"
    [[ "$asked" == requeue || -z "$job" ]] || ! preempted || asked=requeue
    if [[ "$asked" == requeue && -n "$job" ]]; then
        again="$(without_progress requeued)"
        if [[ "$newest" == "$1" ]] && ((again >= MAX_REQUEUES)); then
            echo "error: stopped $((again + 1)) times before a checkpoint was saved (MAX_REQUEUES=$MAX_REQUEUES); allow more" \
                "time (--time, or --signal=B:USR1@SECONDS earlier)" >&2
            record stopped "$code"
            exit 1
        fi
        echo "stopped at ${newest:-the beginning}: back into the queue"
        requeue requeued "$code"
    fi
    echo "stopped at ${newest:-the beginning}: run the same command to resume"
    record stopped "$code"
    exit 3
}
