# shellcheck shell=bash
# Small words that every script speaks. Sourced.

say() { printf '%s\n' "$*" >&2; } # Standard output is for results; DRY_RUN's command is one.

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

dry_run() { [[ ${DRY_RUN:-0} == 1 ]]; }

# One line that a shell, or Python's shlex, reads back as the same words.
print_command() {
  local word line=""
  for word in "$@"; do
    case $word in
      "" | *[!A-Za-z0-9_./:=,@%+-]*) word=$(printf '%q' "$word") ;;
    esac
    line="$line $word"
  done
  printf '%s\n' "${line# }"
}

make_directory() {
  mkdir -p "$1" 2>/dev/null || die "cannot make the folder $1: is a part of that path a file, or not writable?"
}

has_nvidia_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

# Sets PYTHON: the active environment's, else .venv's, else the machine's.
find_python() {
  if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x .venv/bin/python ]]; then
    PYTHON=.venv/bin/python
    PATH="$PATH:$PWD/.venv/bin" # torchrun and ninja; a torchrun that is on PATH already wins.
  elif command -v python >/dev/null; then
    PYTHON=python
  else
    # shellcheck disable=SC2034 # read by the caller
    PYTHON=python3
  fi
}
