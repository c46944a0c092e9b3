#!/usr/bin/env bash
# Runs a compilation by nvcc with -Xptxas=-v and keeps its messages beside the object, as OBJECT.ptxas.
#   keep_ptxas_output.sh [ccache] nvcc ... -o OBJECT ...
set -uo pipefail
object=""
previous=""
for argument in "$@"; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
"$@" 2>"$object.ptxas"
status=$?
grep -v -e '^ptxas info' -e 'bytes stack frame' "$object.ptxas" >&2
exit $status
