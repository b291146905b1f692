#!/usr/bin/env bash
# SmolLM2-135M -> 8 MLA + 22 linear layers at 11% of its KV cache, in about ten minutes on one H200:
#     bash examples/smollm2/run.sh                      # Gated DeltaNet; LINEAR=mamba2 for Mamba2
#     TOKENS=10000000 ALIGN_TOKENS=1000000 WINDOWS=2 MIXER_LR=7e-4 LR=1.5e-4 BETA2=0.98 OUT=runs/smollm2_10m bash examples/smollm2/run.sh
# Every step is a command of its own that leaves a finished folder; run again, the script goes on where it was.
set -euo pipefail

LINEAR="${LINEAR:-gdn}"                              # gdn or mamba2
TOKENS="${TOKENS:-30000000}"                         # training tokens of both stages together
CALIBRATION_TOKENS="${CALIBRATION_TOKENS:-262144}"   # text that the initialisation sees
ALIGN_TOKENS="${ALIGN_TOKENS:-$((TOKENS / 50))}"     # of them, stage 1
WINDOWS="${WINDOWS:-8}"                              # of 2,048 tokens, a step: fewer use text better, more use the GPU better
MIXER_LR="${MIXER_LR:-1e-3}"                         # stage 2, peak learning rate of mixers
LR="${LR:-2e-4}"                                     # of all else
BETA2="${BETA2:-0.95}"                               # stage 2, AdamW
OUT="${OUT:-runs/smollm2_$LINEAR}"                   # folder of everything made
TEXT="${TEXT:-}"                                     # own text (folder or .jsonl); by default Debian documentation packages
NPROC="${NPROC:-1}"                                  # GPUs, data parallel

layout="smollm2-135m-8mla22$([[ $LINEAR == mamba2 ]] && echo m2 || echo gdn)-aligned"
hylo="${HYLO:-hylo}"
train() { if ((NPROC > 1)); then torchrun --nproc-per-node "$NPROC" -m megatron_hylo.cli train "$@"; else $hylo train "$@"; fi; }

graphs=$( ((NPROC == 1)) && echo true || echo false)  # not tried with several ranks

mkdir -p "$OUT"
[[ -d $OUT/teacher ]] || $hylo convert "$($hylo fetch teacher)" "$OUT/teacher"
[[ -d $OUT/data ]] || $hylo preprocess "${TEXT:-$($hylo fetch documents)}" "$OUT/data" --tokenizer "$OUT/teacher"
[[ -d $OUT/calibration ]] || $hylo calibrate "$OUT/teacher" "$OUT/data" "$OUT/calibration" --tokens "$CALIBRATION_TOKENS"
[[ -d $OUT/hybrid ]] || $hylo upcycle "$OUT/teacher" "$OUT/hybrid" --layout "$layout" --calibration "$OUT/calibration"

shared=(--data "$OUT/data" --teacher "$OUT/teacher" --sequence_length 2048 --global_batch_size "$WINDOWS" --eval_windows 128
  --micro_batch_size "$((WINDOWS / NPROC))" --cuda_graphs "$graphs" --optimizer.warmup_ratio 0.05 --optimizer.min_lr_ratio 0.05)
[[ -d $OUT/align/model ]] || train "${shared[@]}" --stage align --model "$OUT/hybrid" \
  --output "$OUT/align" --train_tokens "$ALIGN_TOKENS" --optimizer.mixer_lr 1e-3
[[ -d $OUT/distil/model ]] || train "${shared[@]}" --stage distil --model "$OUT/align/model" --output "$OUT/distil" \
  --train_tokens "$((TOKENS - ALIGN_TOKENS))" --optimizer.mixer_lr "$MIXER_LR" --optimizer.lr "$LR" --optimizer.adam_beta2 "$BETA2"

[[ -d $OUT/export ]] || $hylo export "$OUT/distil/model" "$OUT/export"
$hylo evaluate "$OUT/teacher" "$OUT/data" --windows 128
$hylo evaluate "$OUT/distil/model" "$OUT/data" --teacher "$OUT/teacher" --windows 128
$hylo generate "$OUT/export" "The Linux kernel is" --repetition_penalty 1.2
