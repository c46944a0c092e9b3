#!/usr/bin/env bash
# The bundle of a build and ./run gpu --dry with it, in a folder of its own; then what of gpu_bench the simulator can
# measure, whose times say nothing: every small call between ranks, on one GPU and on several.
#   rehearse.sh BUILD
set -euo pipefail
. tests/gpu/programs.sh
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
ALTIPLANO_BUNDLE_CHECK=1 tests/gpu/make_bundle.sh "$1" "$folder/bundle" "${gpu_programs[@]}"
rm -r "$folder/bundle"  # the file beside it is what travels
tar -C "$folder" -xzf "$folder/bundle.tar.gz"
tests/gpu/run_gpu.py --dry --programs "$folder/bundle/bin" --out "$folder/out"
# As ./run gpu goes on behind a case that failed.
"$folder/bundle/bin/gpu_bench" --dry --part row_ops --json "$folder/whole"
head -n 3 "$folder/whole" >"$folder/pieces"
"$folder/bundle/bin/gpu_bench" --dry --part row_ops --skip 3 --json "$folder/pieces"
cmp "$folder/whole" "$folder/pieces"
# As it is asked whether the GPU survived, and ends one that hangs: the case that it was in is known.
"$1/tests/gpu/simulated_gpu_bench" --check
"$1/tests/gpu/simulated_gpu_bench" --rehearse --json "$folder/hung" &
hung=$!
while ! [ -s "$folder/hung.running" ] && kill -0 $hung; do sleep 0.01; done
kill -9 $hung
grep -q '^{"part":"all_reduce","name":"AllReduceSum.*}$' "$folder/hung.running"
"$1/tests/gpu/simulated_gpu_bench" --rehearse --json "$folder/rehearsed"
cases=$(wc -l <"$folder/rehearsed") measured=$(grep -c '"us":' "$folder/rehearsed" || true)
[ "$cases" -eq 12 ] && [ "$measured" -eq 12 ] ||
  { echo "rehearse: of $cases cases $measured were measured, not 12 of 12: 2, 4 and 8 ranks, with norm and without, on one GPU and on several" >&2; exit 1; }
[ ! -e "$folder/rehearsed.running" ]
