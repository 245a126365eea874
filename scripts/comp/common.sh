# shellcheck shell=bash disable=SC2153 # GLOBAL_BATCH, STAGES ... come from the preset
# What the stage scripts share: which hardware, which command, may it run now. Sourced from scripts/comp/*.sh, never run.
#
# A stage script calls `run_stage NAME FLAGS...`, which
#   1. reads the recipe of that stage: presets/$PRESET.sh, over paper.sh where it is the paper's,
#   2. adds what the hardware asks for and, last, the caller's own flags (the last value of a flag wins),
#   3. makes or asks for what the stage needs: data, predecessor, word prior,
#   4. trains, and leaves OUTPUT/finished.json when it is done.
#
# Environment (docs/recipes.md):
#   PRESET        a file of presets/        default: comp_1b_siglip on GPUs, embedded without
#   ROW           the row of a preset that is a table of the paper
#   OUTPUT_ROOT   runs are written here     default: runs
#   DATA_ROOT     data sets                 default: the preset's
#   NUM_GPUS      GPUs of this machine      default: counted; 0 trains on the CPU
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT         default: SLURM's variables, else one machine
#   NODE_WAIT_MINUTES   how long other nodes wait for what node 0 makes before a stage       default: 60
#   PER_DEVICE_BATCH   samples a GPU holds at once; accumulation follows, the global batch stays the recipe's
#   FRESH=1       train this stage again from the start     DRY_RUN=1   print the command, run nothing

COMP_SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$COMP_SCRIPTS/../.." || exit 1 # Paths in recipes, records and messages are relative to the repository.

source scripts/shell.sh
source scripts/comp/hardware.sh
source scripts/comp/record.sh

load_preset() {
  detect_hardware
  if [[ -z ${PRESET:-} ]]; then
    if ((NUM_GPUS > 0)); then PRESET=comp_1b_siglip; else PRESET=embedded; fi
  fi
  local file="scripts/comp/presets/$PRESET.sh"
  [[ -f $file ]] || die "PRESET=$PRESET is unknown; there are: $(list_presets)"
  ROW=${ROW:-}
  export PRESET ROW
  OUTPUT_ROOT=${OUTPUT_ROOT:-runs}
  RUN="$OUTPUT_ROOT/$PRESET${ROW:+/$ROW}"
  WORD_PRIOR="$RUN/word_prior.safetensors"
  ROWS="" STAGES=() ALIGNMENT=()
  # shellcheck source=scripts/comp/presets/comp_1b_siglip.sh
  source "$file"
  check_row
}

check_row() {
  [[ -n $ROW$ROWS ]] || return 0
  [[ -n $ROWS ]] || die "ROW=$ROW: preset $PRESET has no rows, leave ROW unset"
  [[ -n $ROW && " $ROWS " == *" $ROW "* ]] || die "ROW=$ROW: preset $PRESET has the rows: $ROWS"
}

list_presets() {
  local file names=()
  for file in scripts/comp/presets/*.sh; do names+=("$(basename "$file" .sh)"); done
  printf '%s' "${names[*]}"
}

run_stage() {
  local stage=$1
  shift
  load_preset
  local output="$RUN/$stage"
  build_command "$stage" "$output" "$@"

  if dry_run; then
    print_command "${COMMAND[@]}"
    return
  fi
  require_packages
  ((NNODES == 1)) || [[ ${FRESH:-0} != 1 ]] || die "FRESH=1 on several nodes: delete $output yourself, then start without it."

  make_directory "$RUN"
  lock_output "$stage" "$output" # Held from here on: what is found below stays so.
  if [[ ${FRESH:-0} != 1 ]] && finished "$output"; then
    refuse_changes "$stage" "$output" "$(predecessor_of "$stage")"
    say "$stage: finished already ($output); FRESH=1 trains it again."
    return
  fi
  ensure_predecessor "$stage"
  if [[ ${FRESH:-0} == 1 ]]; then
    delete_output "$output"
  else
    refuse_changes "$stage" "$output" "$(predecessor_of "$stage")"
  fi

  ensure_data "$stage"
  ensure_word_prior "$stage"
  make_directory "$output"
  record_start "$output" "$(predecessor_of "$stage")"
  say "$stage: training into $output ($(describe_hardware))"
  "${COMMAND[@]}" || die "$stage: training ended with exit code $?. The same command continues from the last checkpoint in $output."
  record_finish "$stage" "$output"
}

# The recipe, then the hardware's flags, then the caller's. Sets ARGUMENTS (what the trainer reads) and COMMAND (all of it).
build_command() {
  local stage=$1 output=$2
  shift 2
  refuse_flags "$stage" "$@"
  declare -F "recipe_$stage" >/dev/null || die "preset $PRESET has no stage $stage; it has: ${STAGES[*]}"
  "recipe_$stage"
  split_batch "$stage"
  ARGUMENTS=(
    --output_dir "$output"
    "${RECIPE[@]}"
    --per_device_train_batch_size "$BATCH_PER_DEVICE"
    --gradient_accumulation_steps "$ACCUMULATION"
    "${HARDWARE_FLAGS[@]}"
    "$@"
  )
  COMMAND=("${LAUNCHER[@]}" "${ARGUMENTS[@]}")
}

# Flags that would part what is trained from where it is recorded, or from the recipe's global batch.
refuse_flags() { # STAGE FLAGS...
  local stage=$1 word
  for word in "${@:2}"; do
    [[ $word == --* ]] || continue
    name_flag "$word"
    case $FLAG in
      --output_dir) die "$stage: $word: the scripts write to OUTPUT_ROOT/PRESET/STAGE, here $RUN/$stage; set OUTPUT_ROOT instead." ;;
      --per_device_train_batch_size | --gradient_accumulation_steps)
        die "$stage: $word would change the recipe's global batch; set PER_DEVICE_BATCH instead, accumulation follows." ;;
    esac
  done
}

# --- what a stage needs before it can start -------------------------------------------------------------------------

predecessor_of() { # STAGE -> the stage before it in STAGES, or nothing
  local stage previous=""
  for stage in "${STAGES[@]}"; do
    [[ $stage != "$1" ]] || break
    previous=$stage
  done
  printf '%s' "$previous"
}

# What a stage starts from: the adapter alone is what Stage I leaves, any other stage a whole model. Sets START.
start_of() { # STAGE
  local previous
  previous=$(predecessor_of "$1")
  START=(--model_name_or_path "$LLM" --vision_tower "$VISION_TOWER" --mm_projector_type downsample_mlp)
  case $previous in
    "") ;;
    stage1) START+=(--pretrain_mm_mlp_adapter "$RUN/stage1/mm_projector.bin") ;;
    *) START=(--model_name_or_path "$RUN/$previous") ;; # it brings its own tower
  esac
}

# Nothing to do for a first stage, nor when the caller's own flags start from something else.
ensure_predecessor() {
  local stage=$1 previous start
  previous=$(predecessor_of "$stage")
  [[ -n $previous ]] || return 0
  start="$(flag_value --model_name_or_path) $(flag_value --pretrain_mm_mlp_adapter)"
  [[ $start == *"$RUN/$previous"* ]] || return 0
  if finished "$RUN/$previous"; then return 0; fi
  if ! main_node; then
    wait_for "$RUN/$previous/finished.json"
  elif [[ ${RUN_MISSING_STAGES:-0} == 1 ]]; then
    say "$stage: starts from $RUN/$previous, which is not finished; running that first."
    FRESH=0 bash "scripts/comp/$previous.sh"
  else
    die "$stage starts from $RUN/$previous, which is missing or unfinished. This makes it: PRESET=$PRESET${ROW:+ ROW=$ROW} bash scripts/comp/$previous.sh"
  fi
}

# Data that the preset can make are made, or checked to be what it would make now. Nothing is ever deleted for that.
ensure_data() {
  local stage=$1 data
  data=$(flag_value --data_path)
  if main_node && declare -F prepare_data >/dev/null && ! prepare_data "$data"; then
    [[ $DATA_ROOT != "$RUN"/* ]] ||
      die "$stage: the line above says what is wrong with this run's own data. Word prior and finished stages belong to them: rm -r $RUN starts over, OUTPUT_ROOT=... keeps it and trains elsewhere."
    say "$stage: DATA_ROOT=$DATA_ROOT was chosen by you: going on with what is there."
  fi
  main_node || [[ -e $data ]] || wait_for "$data"
  [[ -e $data ]] || die "$stage: data file $data is missing. docs/data.md says where it comes from and how it is laid out; DATA_ROOT or --data_path says where it is."
}

# The alignment loss weighs words by how often they stand in the Stage-II answers, those that this seed draws. The command
# keeps a file that was counted from these, and counts again where data, tokenizer or seed have changed.
ensure_word_prior() {
  local stage=$1 data=$STAGE2_DATA
  [[ $(flag_value --use_alignment_loss) == True && $(flag_value --word_prior) == "$WORD_PRIOR" ]] || return 0
  if ! main_node; then
    wait_for "$WORD_PRIOR"
    return
  fi
  [[ $stage != stage2_* ]] || data=$(flag_value --data_path)
  "$PYTHON" -m comp_patches.word_prior --data_path "$data" --tokenizer "$(tokenizer_in_force)" --output "$WORD_PRIOR" \
    --seed "$(flag_value --seed)" >&2 ||
    die "$stage: cannot count the words of the Stage-II data $data (docs/data.md) into $WORD_PRIOR: see the line above."
}

# The LLM that this stage starts from; where that is a stage of this run, the one which that stage started from.
tokenizer_in_force() {
  local model
  model=$(flag_value --model_name_or_path)
  while [[ $model == "$RUN"/* && -f $model/arguments.txt ]]; do
    model=$(sed -n 's/^--model_name_or_path //p' "$model/arguments.txt")
  done
  printf '%s' "$model"
}

require_packages() {
  local wanted="torch transformers accelerate"
  ((NUM_GPUS == 0)) || wanted="$wanted deepspeed"
  # shellcheck disable=SC2086 # a list of words
  "$PYTHON" -c 'import importlib.util as i, sys; sys.exit(" ".join(n for n in sys.argv[1:] if not i.find_spec(n)) or 0)' $wanted ||
    die "the packages above are missing for $PYTHON. bash scripts/quickstart.sh sets all up; by hand: pip install -e '.[train]'"
}
