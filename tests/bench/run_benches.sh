#!/usr/bin/env bash
# Runs the measuring programs, achieved against the machine's limit, measured in the same run.
#   run_benches.sh BUILD [NAME] [--json FILE]    NAME: limits, kernels, engine, scheduler; without, all of them. FILE gets a JSON line for each result
set -euo pipefail
usage() { sed -n 's/^# \{0,1\}//;2,3p' "$0"; exit 64; }

build=${1:-}
[ -n "$build" ] || usage >&2
shift
names=() arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --json) [ $# -ge 2 ] || usage >&2; arguments+=(--json "$2"); : >"$2"; shift 2 ;;
    -*) usage >&2 ;;
    *) names+=("$1"); shift ;;
  esac
done
[ ${#names[@]} -gt 0 ] || names=(limits kernels engine scheduler)

for name in "${names[@]}"; do
  program=$build/tests/bench/${name}_bench
  [ -x "$program" ] || { echo "no benchmark $name" >&2; usage >&2; }
  own=()
  if [ "$name" = engine ]; then
    model=$(docker/fetch-demo-model.sh) || { echo "engine: left out, there is no model to measure"; continue; }
    own=(--model "$model")
  fi
  "$program" "${arguments[@]}" "${own[@]}"
done
