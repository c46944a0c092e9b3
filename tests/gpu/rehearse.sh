#!/usr/bin/env bash
# The bundle of a build and ./run gpu --dry with it, in a folder of its own.
#   rehearse.sh BUILD
set -euo pipefail
. tests/gpu/programs.sh
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
ALTIPLANO_BUNDLE_CHECK=1 tests/gpu/make_bundle.sh "$1" "$folder/bundle" "${gpu_programs[@]}"
tests/gpu/run_gpu.py --dry --programs "$folder/bundle/bin" --out "$folder/out"
