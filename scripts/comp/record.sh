# shellcheck shell=bash
# What a run leaves beside its weights: arguments.txt when a stage starts, finished.json when it is done.
# Sourced by common.sh; reads the ARGUMENTS that build_command made.

# Flags that may change between two starts of one run: where, how fast, how often. The rest decides what comes out.
FREE_FLAGS="--output_dir --per_device_train_batch_size --gradient_accumulation_steps --use_cpu --deepspeed --bf16 --tf32
  --dataloader_num_workers --report_to --run_name --logging_steps --save_strategy --save_steps --save_total_limit
  --eval_data_path --eval_strategy --eval_steps --per_device_eval_batch_size --eval_tasks --eval_tasks_steps --eval_tasks_limit
  --allow_changed_data"

# ARGUMENTS as lines "--flag value ...", in the order given.
flag_lines() {
  local word line=""
  for word in "${ARGUMENTS[@]}"; do
    case $word in
      --*)
        [[ -z $line ]] || printf '%s\n' "$line"
        name_flag "$word"
        line=$FLAG
        [[ $word != *=* ]] || line="$line ${word#*=}"
        ;;
      *) line="$line $word" ;;
    esac
  done
  printf '%s\n' "$line"
}

name_flag() { # --some-flag=value: sets FLAG to --some_flag, as the trainer reads it
  FLAG=${1%%=*}
  FLAG=${FLAG#--}
  FLAG=--${FLAG//-/_}
}

flag_value() { # FLAG -> its last value in ARGUMENTS
  flag_lines | awk -v flag="$1" '$1 == flag { sub(/^[^ ]+ ?/, ""); value = $0 } END { print value }'
}

# The recipe as it will be trained: the last value of every flag that is not free, the batch, and the weights it starts from.
recipe_lines() {
  local previous=$1
  flag_lines | awk -v free="$FREE_FLAGS" '
    BEGIN { n = split(free, names); for (i = 1; i <= n; i++) skip[names[i]] = 1 }
    !($1 in skip) { last[$1] = $0 }
    END { for (flag in last) print last[flag] }' | LC_ALL=C sort
  printf 'global batch %s\n' "$GLOBAL_BATCH"
  if [[ -n $previous ]] && finished "$RUN/$previous"; then
    printf 'start %s\n' "$(cat "$RUN/$previous/finished.json")"
  fi
}

finished() { [[ -f $1/finished.json ]]; }

# Something is there that other arguments would spoil: a start that failed before its first checkpoint binds nobody.
started() { [[ -f $1/arguments.txt ]] && { finished "$1" || compgen -G "$1/checkpoint-*" >/dev/null; }; }

refuse_changes() {
  local stage=$1 output=$2 previous=$3 changes
  started "$output" || return 0
  if changes=$(diff "$output/arguments.txt" <(recipe_lines "$previous")); then return 0; fi
  say "$stage: $output was started with other arguments:"
  printf '%s\n' "$changes" | sed -n -e 's/^< /  was: /p' -e 's/^> /  now: /p' >&2
  die "FRESH=1 deletes it and trains $stage again; OUTPUT_ROOT=... keeps it and trains elsewhere."
}

record_start() {
  local output=$1 previous=$2
  main_node || return 0
  ! started "$output" || return 0
  recipe_lines "$previous" >"$output/arguments.txt.partial"
  mv "$output/arguments.txt.partial" "$output/arguments.txt"
}

record_finish() {
  local stage=$1 output=$2
  main_node || return 0
  printf '{"preset": "%s", "stage": "%s", "finished": "%s"}\n' "$PRESET${ROW:+/$ROW}" "$stage" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" \
    >"$output/finished.json.partial"
  mv "$output/finished.json.partial" "$output/finished.json"
  say "$stage: finished ($output)"
}

# FRESH=1. Only a folder that one of these scripts started.
delete_output() {
  [[ -d $1 ]] || return 0
  [[ -f $1/arguments.txt ]] || die "FRESH=1 would delete $1, which these scripts did not make (no arguments.txt in it)"
  say "FRESH=1: deleting $1"
  rm -rf -- "$1"
}

# Two runs must not write into one folder. The training process inherits descriptor 9, so the lock lives as long as it does,
# even if this shell is killed. It lies beside the folder, for FRESH=1 deletes that. The same command waits, then goes on.
# A training that was started by hand takes the same lock (llava/train/output_folder.py); ours is told that we hold it.
lock_output() {
  local stage=$1 output=$2 lock holder
  if ! main_node || ! command -v flock >/dev/null; then return 0; fi
  lock="${output%/*}/.$stage.lock"
  exec 9>>"$lock"
  export LLAVA_OUTPUT_LOCK="$PWD/$lock"
  [[ $lock != /* ]] || LLAVA_OUTPUT_LOCK=$lock
  if flock -n 9; then return 0; fi
  holder=$(trainings_under "$lock")
  holder="another start of this stage${holder:+, process $holder, which trains into $output}"
  [[ ${FRESH:-0} != 1 ]] || die "$stage: FRESH=1 would delete $output under $holder: end that one first, or let it end."
  say "$stage: waiting for $holder."
  flock 9
}

# LOCK -> ids of this machine's trainings that have it open. The shells that only wait for it have too.
trainings_under() {
  local process ids=()
  for process in /proc/[0-9]*; do
    [[ $process/fd/9 -ef $1 ]] || continue
    if grep -qs llava.train.train_mem "$process/cmdline"; then ids+=("${process##*/}"); fi
  done
  printf '%s' "${ids[*]}"
}
