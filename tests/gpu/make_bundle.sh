#!/usr/bin/env bash
# Puts what ./run gpu needs into one folder for a machine that has a GPU, its driver and Python, and none of our
# libraries: programs, stripped, and every shared library that a bare Debian or Ubuntu lacks. FOLDER.tar.gz has all of
# it, in less than half of the bytes.
#   make_bundle.sh BUILD FOLDER PROGRAM...     programs as paths below BUILD
# With ALTIPLANO_BUNDLE_CHECK=1 each program is also started in a root folder that holds the bundle and the C and C++
# runtimes alone.
set -euo pipefail
[ $# -ge 3 ] || { sed -n 's/^# \{0,1\}//;2,7p' "$0" >&2; exit 64; }
build=$1 folder=$2
shift 2
most_bytes=$((60 * 1024 * 1024))
# What the machine itself brings: the C and C++ runtimes.
of_system='^(ld-linux-x86-64|libc|libm|libdl|librt|libpthread|libresolv|libstdc\+\+|libgcc_s)\.so'

rm -rf "$folder"
mkdir -p "$folder/bin" "$folder/lib"
for program in "$@"; do
  strip -o "$folder/bin/$(basename "$program")" "$build/$program"
done
ldd "$folder"/bin/* | awk '$2 == "=>" {print $1, $3}' | sort -u | while read -r name path; do
  [[ $name =~ $of_system ]] && continue
  [ "$path" != not ] || { echo "make_bundle: $name is not on this machine" >&2; exit 1; }
  strip -o "$folder/lib/$name" "$path"
done
git rev-parse --short HEAD >"$folder/COMMIT"
bytes=$(du -sb "$folder" | cut -f1)
[ "$bytes" -le $most_bytes ] || { echo "make_bundle: $folder has $bytes bytes, more than $most_bytes" >&2; exit 1; }

if [ -n "${ALTIPLANO_BUNDLE_CHECK:-}" ] && ! unshare --user --map-root-user true 2>/dev/null; then
  echo "make_bundle: no user namespaces here, so the programs are not started on a bare root" >&2
elif [ -n "${ALTIPLANO_BUNDLE_CHECK:-}" ]; then
  root=$(mktemp -d)
  trap 'rm -rf "$root"' EXIT
  mkdir -p "$root/lib64" "$root/lib/x86_64-linux-gnu" "$root/tmp"
  cp -r "$folder" "$root/bundle"
  cp -L /lib64/ld-linux-x86-64.so.2 "$root/lib64/"
  for name in libc.so.6 libm.so.6 libdl.so.2 librt.so.1 libpthread.so.0 libresolv.so.2 libstdc++.so.6 libgcc_s.so.1; do
    # To the end of the list: who stops reading ends ldconfig by a signal, and with it this script.
    path=$(ldconfig -p | awk -v name="$name" '$1 == name && /x86-64/ && found == "" {found = $NF} END {print found}')
    [ -z "$path" ] || cp -L "$path" "$root/lib/x86_64-linux-gnu/"
  done
  for program in "$folder"/bin/*; do
    case "$program" in
      *_test) arguments=(--gtest_list_tests) ;;
      */gpu_bench) arguments=(--dry --json /tmp/cases) ;;
      *) arguments=(version) ;;
    esac
    env -i "$(command -v unshare)" --user --map-root-user "$(PATH=$PATH:/usr/sbin command -v chroot)" "$root" \
      /lib64/ld-linux-x86-64.so.2 --library-path /bundle/lib:/lib/x86_64-linux-gnu \
      "/bundle/bin/$(basename "$program")" "${arguments[@]}" >"$root/log" 2>&1 ||
      { echo "make_bundle: $(basename "$program") does not start on a bare machine:" >&2; head -n 5 "$root/log" >&2; exit 1; }
  done
fi
tar -C "$(dirname "$folder")" -czf "$folder.tar.gz" "$(basename "$folder")"
echo "$folder: $(ls "$folder/bin" | wc -l) programs, $(ls "$folder/lib" | wc -l) libraries, $((bytes / 1024 / 1024)) MiB;" \
  "packed $(($(stat -c %s "$folder.tar.gz") / 1024 / 1024)) MiB"
