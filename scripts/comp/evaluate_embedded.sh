#!/usr/bin/env bash
# Held-out accuracy of the embedded run, stage by stage, then its table and report.html.
# train_all.sh calls it at the end; by itself it evaluates what is finished and not yet evaluated.
set -euo pipefail

PRESET=${PRESET:-embedded}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
load_preset
RESULTS="$RUN/evaluation"

main() {
  dry_run || make_directory "$RESULTS"
  make_untrained

  # Questions: before anything is trained, before and after Stage III, and the two controls that must fail.
  answer untrained untrained
  answer untrained_blank untrained --blank
  answer stage2_native stage2_native
  answer stage3_sft stage3_sft
  answer stage3_sft_blank stage3_sft --blank
  answer stage3_sft_random_tower stage3_sft --random-tower

  # Captions: what native resolution adds. The fixed stage sees images as it was trained, squashed; the native one as they are.
  caption stage2_fixed stage2_fixed --force-resize 192
  caption stage2_native stage2_native

  run "$PYTHON" -m llava.eval.report --run "$RUN"
}

answer() { evaluate "qa_$1" "$2" --questions "$DATA_ROOT/heldout_qa.json" "${@:3}"; }
caption() { evaluate "captions_$1" "$2" --captions "$DATA_ROOT/heldout_captions.json" "${@:3}"; }

evaluate() { # NAME STAGE FLAGS...
  local output="$RESULTS/$1.jsonl" stage=$2
  if ! dry_run; then
    finished "$RUN/$stage" || return 0
    # Evaluated already, and not trained again since.
    if [[ -s $output && $output -nt $RUN/$stage/finished.json ]]; then return 0; fi
    say "evaluating $1"
  fi
  run "$PYTHON" -m llava.eval.held_out --model-path "$RUN/$stage" --image-folder "$DATA_ROOT" --output "$output" "${@:3}"
}

# The model that Stage I starts from, as a checkpoint: one step of Stage I at learning rate 0 leaves the adapter random.
make_untrained() {
  local output="$RUN/untrained"
  if ! dry_run && { finished "$output" || ! finished "$RUN/stage1"; }; then return 0; fi
  build_command stage1 "$output" --learning_rate 0 --max_steps 1 --use_alignment_loss False
  run "${COMMAND[@]}"
  dry_run || record_finish untrained "$output"
}

run() { if dry_run; then print_command "$@"; else "$@"; fi; }

main
