#!/usr/bin/env bash
# Runs the measuring programs, achieved against the machine's limit, measured in the same run.
#   run_benches.sh BUILD [NAME...] [--json FILE] [--cpu]
# NAME: limits, kernels, engine, scheduler, tokenizer, frontend; without, all of these. peer: this engine beside
# llama.cpp, which it fetches from PyPI (ALTIPLANO_LLAMA_BATCHED_BENCH=PROGRAM also measures a build of your own). --cpu:
# engine and peer in CPU seconds of one thread, for a machine that is never quiet. FILE gets a JSON line for each result.
set -euo pipefail
usage() { sed -n 's/^# \{0,1\}//;2,6p' "$0"; exit 64; }

build=${1:-}
[ -n "$build" ] || usage >&2
shift
names=() arguments=() peer_arguments=() engine_arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --json) [ $# -ge 2 ] || usage >&2; arguments+=(--json "$2"); : >"$2"; shift 2 ;;
    --cpu) peer_arguments+=(--cpu) engine_arguments+=(--threads 1); shift ;;
    -*) usage >&2 ;;
    *) names+=("$1"); shift ;;
  esac
done
[ ${#names[@]} -gt 0 ] || names=(limits kernels engine scheduler tokenizer frontend)

# A Python with these packages, kept beside the build.
python_with() {
  local folder=build/bench-python log=build/bench-python.log
  [ -x "$folder/bin/python" ] || python3 -m venv "$folder" >"$log" 2>&1 || { tail -n 1 "$log" >&2; return 1; }
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >"$log" 2>&1 || { tail -n 1 "$log" >&2; return 1; }
  echo "$folder/bin/python"
}

peer() {
  local model python bf16
  model=$(docker/fetch-demo-model.sh) || return
  python=$(python_with xllamacpp gguf numpy) || { echo "peer: its packages cannot be had" >&2; return 1; }
  bf16=${model%.*.gguf}.bf16.gguf
  [ -f "$bf16" ] || "$python" tests/bench/gguf_to_bf16.py "$model" "$bf16"
  [ -z "${ALTIPLANO_LLAMA_BATCHED_BENCH:-}" ] || peer_arguments+=(--native "$ALTIPLANO_LLAMA_BATCHED_BENCH")
  "$python" tests/bench/peer_bench.py "$build/altiplano" "$bf16" "${arguments[@]}" "${peer_arguments[@]}"
}

for name in "${names[@]}"; do
  [ "$name" = peer ] && { peer; continue; }
  program=$build/tests/bench/${name}_bench
  [ -x "$program" ] || { echo "no benchmark $name" >&2; usage >&2; }
  own=()
  case "$name" in
    engine)
      model=$(docker/fetch-demo-model.sh) || { echo "engine: left out, there is no model to measure"; continue; }
      own=(--model "$model" "${engine_arguments[@]}") ;;
    frontend) own=(--program "$build/altiplano") ;;
    tokenizer)
      if python=$(python_with tiktoken); then own=(--tiktoken-python "$python"); fi ;;
  esac
  "$program" "${arguments[@]}" "${own[@]}"
done
