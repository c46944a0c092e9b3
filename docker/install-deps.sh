#!/usr/bin/env bash
# Installs what Altiplano needs from the distribution's packages. Used by ./run, CI and the Dockerfiles alike.
#   docker/install-deps.sh build      compiler, libraries and test tools
#   docker/install-deps.sh runtime    only what the finished program links to
#   docker/install-deps.sh fuzz       clang with libFuzzer, beside what "build" installs
# Prints nothing when everything is there. Debian 12 and Ubuntu 24.04.
set -euo pipefail

build_packages=(
  g++ cmake ninja-build ccache pkg-config git ca-certificates
  libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc libspdlog-dev nlohmann-json3-dev zlib1g-dev
  libgtest-dev libgmock-dev iproute2
  python3 python3-venv python3-pip
)
# Debian 12's name, then Ubuntu 24.04's.
runtime_packages=("libgrpc++1.51|libgrpc++1.51t64" "libprotobuf32|libprotobuf32t64" "libspdlog1.10|libspdlog1.12" zlib1g ca-certificates)
# Each distribution's clang wants the runtime of its own version.
fuzz_packages=(clang "libclang-rt-18-dev|libclang-rt-14-dev")

case "${1:-build}" in
  build) wanted=("${build_packages[@]}") ;;
  runtime) wanted=("${runtime_packages[@]}") ;;
  fuzz) wanted=("${fuzz_packages[@]}") ;;
  *) echo "usage: $0 [build|runtime|fuzz]" >&2; exit 64 ;;
esac

installed() { dpkg-query -W -f='${Status}' "$1" 2>/dev/null | grep -q '^install ok installed$'; }
missing=()
for names in "${wanted[@]}"; do
  IFS='|' read -r -a alternatives <<<"$names"
  for name in "${alternatives[@]}"; do installed "$name" && continue 2; done
  missing+=("$names")
done
[ ${#missing[@]} -eq 0 ] && exit 0

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "Missing packages: ${missing[*]}. Install them as root, or install sudo." >&2; exit 69; }
  as_root=(sudo)
fi
echo "Installing: ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
install() {
  "${as_root[@]}" apt-get update -qq
  local chosen=() names alternatives name
  for names in "${missing[@]}"; do
    IFS='|' read -r -a alternatives <<<"$names"
    for name in "${alternatives[@]}"; do
      if apt-cache show "$name" >/dev/null 2>&1; then chosen+=("$name"); continue 2; fi
    done
    echo "no package: $names"; return 1
  done
  "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${chosen[@]}"
}
if ! install >"$log" 2>&1; then
  tail -n 20 "$log" >&2
  echo "Could not install: ${missing[*]}" >&2
  exit 69
fi
