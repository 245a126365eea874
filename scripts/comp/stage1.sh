#!/usr/bin/env bash
# Stage I: the adapter alone, at the tower's own fixed size, without RoPE-2D.
# Its values: presets/$PRESET.sh. More flags may follow, the last value of a flag wins: see docs/recipes.md.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_stage stage1 "$@"
