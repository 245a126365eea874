# shellcheck shell=bash
# The environment that quickstart.sh and test.sh run in. Sourced; needs scripts/shell.sh and the repository as working folder.

CPU_TORCH=2.13.0 # What CI runs. Everything else it runs stands in constraints.txt.

# ensure_environment EXTRAS: an active environment with torch, this project and its extras. Quick when nothing has changed.
ensure_environment() {
  local extras=$1 stamp wanted
  activate_or_make
  stamp="$(python -c 'import sys; print(sys.prefix)')/.llava-comp-$extras"
  wanted="$PWD $(cat pyproject.toml constraints.txt | cksum)"
  if [[ -f $stamp && $(cat "$stamp") == "$wanted" ]]; then
    say "set-up: $(command -v python) already has [$extras]"
    return
  fi
  ensure_torch || die "pip could not install torch"
  install_project "$extras" || die "pip could not install llava-comp[$extras]"
  printf '%s\n' "$wanted" >"$stamp"
}

activate_or_make() {
  if [[ -n ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} ]]; then
    say "set-up: using the active environment ${VIRTUAL_ENV:-$CONDA_PREFIX}"
  else
    # pip too: without python3-venv a half-made .venv with a python and no pip is left behind.
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
      local modern
      modern=$(find_modern_python) || exit 1 # It has said why.
      say "set-up: no environment is active; making .venv"
      "$modern" -m venv --clear .venv || die "cannot make .venv (on Debian: apt install python3-venv)"
    fi
    # shellcheck source=/dev/null
    source .venv/bin/activate
  fi
  python -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$(python --version) is too old; 3.10 or newer is needed"
}

# The first python3 of 3.10 or newer: the machine's own, else one with the version in its name.
find_modern_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  die "no Python of 3.10 or newer on PATH"
}

# Without an NVIDIA GPU the CUDA build is gigabytes for nothing: take the CPU build where pip's sources offer one.
ensure_torch() {
  if python -c 'import torch' 2>/dev/null; then return; fi
  if has_nvidia_gpu; then
    say "set-up: NVIDIA GPU found; pip installs its default torch"
    return
  fi
  say "set-up: no NVIDIA GPU; installing torch, the CPU build where pip's sources have it"
  python -m pip install --quiet "torch==$CPU_TORCH+cpu" 2>/dev/null ||
    python -m pip install --quiet "torch==$CPU_TORCH" ||
    python -m pip install --quiet torch || return
  say "set-up: torch $(python -c 'import torch; cuda = torch.version.cuda; print(torch.__version__, f"(CUDA {cuda} build)" if cuda else "(CPU build)")')"
}

install_project() {
  say "set-up: installing llava-comp[$1] (a minute or so)"
  if python -m pip install --quiet -c constraints.txt -e ".[$1]"; then return; fi
  say "set-up: the exact versions of constraints.txt are not to be had here; taking what pyproject.toml's ranges allow"
  python -m pip install --quiet -e ".[$1]"
}

# Chromium for the web page's tests: what is there, else Debian's, else playwright's own. Without one they skip and say so.
ensure_browser() {
  if command -v chromium google-chrome >/dev/null; then return; fi
  if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    say "set-up: installing chromium (apt)"
    apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium >/dev/null && return
  fi
  say "set-up: installing chromium (playwright)"
  python -m playwright install chromium || say "set-up: no browser to be had; the web page's tests are skipped"
}
