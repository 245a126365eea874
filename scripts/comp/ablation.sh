#!/usr/bin/env bash
# A table of the paper from its preset: trains its rows, one after the other, scores each, and renders the table.
#   bash scripts/comp/ablation.sh tab4                 Tab. 4, 5a, 5b, 6 and 9 by AI2D, ChartQA and DocVQA; Tab. 8 by the probes
#   bash scripts/comp/ablation.sh tab5b no_prior none  only these rows
# What is trained or scored already is skipped, so stop and start as you like. Scores: runs/TABLE/ROW/results/*.json.
set -euo pipefail

# Environment: that of train_all.sh and eval.sh, and for Tab. 8
#   IMAGENET     folder with train/ and val/, or hf:NAME      default: data/imagenet
#   ADE20K       folder with images/ and annotations/         default: data/ade20k
table=${1:?TABLE is missing: bash scripts/comp/ablation.sh tab4|tab5a|tab5b|tab6|tab8|tab9 [ROWS...]}
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/shell.sh
source scripts/comp/hardware.sh

file=scripts/comp/presets/$table.sh
[[ -f $file ]] || die "TABLE $table: there is no $file"
listed=$(sed -n 's/^ROWS="\(.*\)"$/\1/p' "$file")
[[ -n $listed ]] || die "TABLE $table: $file has no rows"
rows=("$@")
# shellcheck disable=SC2206 # a list of words
((${#rows[@]})) || rows=($listed)
detect_hardware
probe_launcher=("$PYTHON")
((NUM_GPUS < 2)) || probe_launcher=(torchrun --nproc_per_node="$NUM_GPUS")

main() {
  local row results
  for row in "${rows[@]}"; do
    [[ " $listed " == *" $row "* ]] || die "ROW $row: $table has the rows: $listed"
    results=${OUTPUT_ROOT:-runs}/$table/$row/results
    PRESET=$table ROW=$row bash scripts/comp/train_all.sh
    if [[ $table == tab8 ]]; then
      probes "$row" "$results"
    elif [[ ! -f $results/scores.json ]]; then
      RESULTS=$results LABEL="$table, $row" TABLE_ROW=$table/$row bash scripts/comp/eval.sh "${results%/results}/stage3_sft" ablation
    fi
  done
  shopt -s nullglob
  local measured=("${OUTPUT_ROOT:-runs}/$table"/*/results/*.json "${OUTPUT_ROOT:-runs}/$table"/*/results/*/results.json)
  run "$PYTHON" -m llava.eval.tables "${measured[@]}" --tables "$table" --output "${OUTPUT_ROOT:-runs}/$table/table"
}

probes() { # ROW RESULTS: the towers that Stage II left, at both sizes of both tasks
  local tower=comp-siglip:${2%/results}/stage2_native size
  for size in 224 448; do probe classification "$size" "${IMAGENET:-data/imagenet}" "$@" "$tower"; done
  for size in 504 672; do probe segmentation "$size" "${ADE20K:-data/ade20k}" "$@" "$tower"; done
}

probe() { # TASK SIZE DATA ROW RESULTS TOWER
  [[ ! -f $5/$1_$2/results.json ]] || return 0
  run "${probe_launcher[@]}" -m "llava.eval.$1" --tower "$6" --data "$3" --size "$2" --output "$5/$1_$2" \
    --num_workers 16 --label "$table, $4" --row "$table/$4"
}

run() { if dry_run; then print_command "$@"; else "$@"; fi; }

main
