#!/usr/bin/env bash
# The method in a checkout of LLaVA-NeXT or haotian-liu/LLaVA, and out again: apply, one training step and one answer
# with --vision_tower comp-siglip of a tiny model on a CPU, revert, and git sees nothing changed.
#   bash scripts/try_upstream.sh PATH/TO/LLaVA-NeXT
#   UPSTREAM_PYTHON=PATH/TO/python   the Python of upstream's environment (default: python)
#   WORK=FOLDER                      where the tiny files go, and stay (default: a temporary folder). A checkpoint that is
#                                    there already is answered with; its training is not repeated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/shell.sh

[[ $# == 1 && -d $1 ]] || die "expected one folder, a git checkout: bash scripts/try_upstream.sh PATH/TO/LLaVA-NeXT"
checkout=$(cd "$1" && pwd)
upstream_python=${UPSTREAM_PYTHON:-python}
command -v "$upstream_python" >/dev/null || die "UPSTREAM_PYTHON=$upstream_python is no program."
upstream_python=$(command -v "$upstream_python")
find_python

patch() { "$PYTHON" -m comp_patches.upstream "$1" "$checkout"; }

changes() { git -C "$checkout" status --porcelain; }

# In upstream's own environment, where this project's `llava` must not be in reach.
upstream() { (cd "$checkout" && env -u PYTHONPATH "$upstream_python" "$tiny" "$@"); }

[[ ! -e $checkout/llava/comp_patches ]] || die "the method is in $checkout already. Take it out first: \
python -m comp_patches.upstream revert $1"
tiny=$PWD/scripts/upstream/tiny.py
before=$(changes)
if [[ -n ${WORK:-} ]]; then
  make_directory "$WORK"
  work=$(cd "$WORK" && pwd)
else
  work=$(mktemp -d)
fi
tidy_up() { # also where a step failed
  [[ $(changes) == "$before" ]] || patch revert
  [[ -n ${WORK:-} ]] || rm -rf "$work"
}
trap tidy_up EXIT

patch apply
if ! compgen -G "$work/llava_*_out/config.json" >/dev/null; then
  patch check || die "training cannot start there. Train at a commit that can, with WORK=FOLDER, and come back with it."
  say "== make a tiny language model, a tiny SigLIP and four records"
  upstream make "$work"
  say "== train one step"
  upstream train "$work" --use_alignment_loss True --word_prior uniform
fi
say "== answer"
upstream answer "$work"
patch revert
[[ $(changes) == "$before" ]] || die "git status is not what it was before: $(changes)"
say "== git status is what it was before"
