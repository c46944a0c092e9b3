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

echo "1/3 packages and build (minutes the first time, seconds after that)"
./run build release altiplano
program=build/release/altiplano

echo "2/3 model"
if ! model=$(docker/fetch-demo-model.sh); then
  model=tests/data/tiny
  echo "Falling back to the committed tiny model, $model: 4 million parameters, good for formats and serving, not for sense."
fi

echo "3/3 serve"
out=$(mktemp)
"$program" serve --model "$model" --listen 127.0.0.1:0 --log-level warn >"$out" &
server=$!
stop() {
  if kill -0 "$server" 2>/dev/null; then
    kill -TERM "$server"
    wait "$server" && echo "Server drained and left with exit code 0." || echo "Server left with exit code $?." >&2
  fi
  rm -f "$out"
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
