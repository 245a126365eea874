#!/usr/bin/env bash
# Stage II, second half: the same at every image's own resolution.
# Its values: presets/$PRESET.sh. More flags may follow, the last value of a flag wins: see docs/recipes.md.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_stage stage2_native "$@"
