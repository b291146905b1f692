#!/usr/bin/env bash
# SmolLM2-135M -> 8 MLA + 22 linear layers at 11% of its KV cache, in about ten minutes on one H200:
#     bash examples/smollm2/run.sh                      # Gated DeltaNet; LINEAR=mamba2 for Mamba2
#     TOKENS=10000000 ALIGN_TOKENS=1000000 WINDOWS=2 MIXER_LR=7e-4 LR=1.5e-4 BETA2=0.98 OUT=runs/smollm2_10m bash examples/smollm2/run.sh
# Without a GPU the sizes are the quickstart's: about a quarter of an hour on two CPU cores.
# Every step is a command of its own that leaves a finished folder; run again, the script goes on where it was.
# shellcheck source=examples/smollm2/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usual LENGTH 2048 256                # tokens a window
usual TOKENS 30000000 22528          # training tokens of both stages together
usual ALIGN_TOKENS "$((TOKENS / 50))" "$((TOKENS * 2 / 11))" # of them, stage 1
usual WINDOWS 8 2                    # windows a step: fewer use text better, more use the device better
usual EVAL_WINDOWS 128 8             # held-out windows
usual ALIGN_MIXER_LR 1e-3 1.25e-4    # stage 1, peak learning rate of mixers
usual MIXER_LR 1e-3 1.25e-4          # stage 2, of mixers
usual LR 2e-4 1e-4                   # stage 2, of all else
usual PRECISION bf16 fp32
BETA2="${BETA2:-0.95}"               # stage 2, AdamW
OUT="${OUT:-runs/smollm2_$LINEAR}"   # folder of everything made
NPROC="${NPROC:-1}"                  # GPUs
if [[ $device == cpu ]]; then
  echo "no GPU here: $TOKENS training tokens in windows of $LENGTH, fp32 (on a GPU 30,000,000 in windows of 2,048, bf16)" >&2
fi
graphs=$([[ $device == gpu && $NPROC == 1 ]] && echo true || echo false) # which are of one GPU
layout="smollm2-135m-8mla22$([[ $LINEAR == mamba2 ]] && echo m2 || echo gdn)-teacher"
train() {
  if ((NPROC == 1)); then $hylo train "$@"; return; fi
  python -m megatron_hylo.train.launch --standalone --nproc-per-node "$NPROC" -m megatron_hylo.cli train "$@"
}

prepare documents
[[ -d $OUT/hybrid ]] || $hylo upcycle "$OUT/teacher" "$OUT/hybrid" --layout "$layout" --calibration "$OUT/calibration"
shared=(--data "$OUT/data" --teacher "$OUT/teacher" --sequence_length "$LENGTH" --global_batch_size "$WINDOWS"
  --micro_batch_size "$((WINDOWS / NPROC))" --eval_windows "$EVAL_WINDOWS" --precision "$PRECISION" --cuda_graphs "$graphs"
  --optimizer.warmup_ratio 0.05 --optimizer.min_lr_ratio 0.05)
[[ -d $OUT/align/model ]] || train "${shared[@]}" --stage align --model "$OUT/hybrid" \
  --output "$OUT/align" --train_tokens "$ALIGN_TOKENS" --optimizer.mixer_lr "$ALIGN_MIXER_LR"
[[ -d $OUT/distil/model ]] || train "${shared[@]}" --stage distil --model "$OUT/align/model" --output "$OUT/distil" \
  --train_tokens "$((TOKENS - ALIGN_TOKENS))" --optimizer.mixer_lr "$MIXER_LR" --optimizer.lr "$LR" --optimizer.adam_beta2 "$BETA2"

[[ -d $OUT/export ]] || $hylo export "$OUT/distil/model" "$OUT/export"
$hylo evaluate "$OUT/teacher" "$OUT/data" --windows "$EVAL_WINDOWS" --sequence_length "$LENGTH"
$hylo evaluate "$OUT/distil/model" "$OUT/data" --teacher "$OUT/teacher" --windows "$EVAL_WINDOWS" --sequence_length "$LENGTH"
$hylo generate "$OUT/export" "The Linux kernel is" --repetition_penalty 1.2
$hylo report "$OUT" # curves and settings of both stages, one page
