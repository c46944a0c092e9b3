#!/usr/bin/env bash
# ./run demo [--keep]: from a bare machine to two streamed answers.
set -euo pipefail
cd "$(dirname "$0")/.."

keep=""
case "${1:-}" in
  "") ;;
  --keep) keep=yes ;;
  *) echo "usage: ./run demo [--keep]" >&2; exit 64 ;;
esac

echo "1/4 packages"
docker/install-deps.sh build
echo "2/4 build (minutes the first time, seconds after that)"
# The demo needs no tests and no CUDA; its build folder is its own, so that ./run build keeps its settings.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
cmake --preset release -B build/demo -DALTIPLANO_TESTS=OFF -DALTIPLANO_CUDA=OFF -Wno-dev >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
ninja -C build/demo altiplano
program=build/demo/altiplano

echo "3/4 model"
if ! model=$(docker/fetch-demo-model.sh); then
  model=tests/data/tiny
  echo "Falling back to the committed tiny model, $model: 4 million parameters, good for formats and serving, not for sense."
fi

echo "4/4 serve"
out=$(mktemp)
"$program" serve --model "$model" --listen 127.0.0.1:0 --log-level warn >"$out" &
server=$!
stop() {
  if kill -0 "$server" 2>/dev/null; then
    kill -TERM "$server"
    wait "$server" && echo "Server drained and left with exit code 0." || echo "Server left with exit code $?." >&2
  fi
  rm -f "$out" "$log"
}
trap stop EXIT
trap 'exit 130' INT TERM
until grep -q '^READY' "$out"; do
  kill -0 "$server" 2>/dev/null || { echo "The server did not start." >&2; exit 1; }
  sleep 0.05
done
cat "$out"
address=$(sed -n 's/^READY .*address=\([^ ]*\).*/\1/p' "$out")

"$program" demo --url "$address"

if [ -n "$keep" ]; then
  cat <<TEXT

The server goes on at $address until ctrl-C. Try, from another terminal in this folder:
  $program chat --url $address
  $program generate --url $address --prompt "Once upon a time"
  $program bench serve --url $address --num-prompts 32 --max-concurrency 8
  grpcurl -plaintext $address list
  grpcurl -plaintext -d '{"request": {"chat": {"messages": [{"role": "ROLE_USER", "content": "Hello!"}]}, "stopping": {"max_new_tokens": 40}}}' \\
    $address altiplano.inference.v1.InferenceService/StreamGenerate
TEXT
  wait "$server"
fi
