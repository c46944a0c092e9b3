#!/usr/bin/env bash
# A fresh Debian 12 machine without a container engine: a debootstrap chroot. Runs both README commands in a clean clone of
# HEAD, then builds the stages of cpu.Dockerfile by the same lines and serves from the runtime stage as its own user.
#   docker/chroot-test.sh [FOLDER] [demo|test|image ...]     default: a temporary folder; all three
# Needs root, debootstrap and the network. The host's CA certificates are taken along, for networks with their own.
set -euo pipefail
cd "$(dirname "$0")/.."
project=$PWD
COMMIT=$(git rev-parse --short=12 HEAD)

root=${1:-}
[ $# -gt 0 ] && shift
[ -n "$root" ] || root=$(mktemp -d)
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(demo test image)
[ "$(id -u)" -eq 0 ] || { echo "needs root, for chroot" >&2; exit 77; }
command -v debootstrap >/dev/null || apt-get install -y -qq debootstrap >/dev/null || { echo "needs debootstrap" >&2; exit 77; }

bootstrap() {  # folder
  if [ ! -e "$1/etc/debian_version" ]; then
    debootstrap --variant=minbase bookworm "$1" >"$1.log" 2>&1 || { tail -n 5 "$1.log" >&2; exit 1; }
    echo "deb $(sed -n 's/^deb \([^ ]*\) bookworm main$/\1/p' "$1/etc/apt/sources.list") bookworm-updates main" >>"$1/etc/apt/sources.list"
  fi
  cp /etc/resolv.conf /etc/hosts "$1/etc/"
  mkdir -p "$1/usr/local/share/ca-certificates"
  cp -r /usr/local/share/ca-certificates/. "$1/usr/local/share/ca-certificates/" 2>/dev/null || true
}

mounted=()
enter() {  # folder: mount what programs expect of a machine
  for fs in proc dev sys; do
    mountpoint -q "$1/$fs" || { mount --rbind "/$fs" "$1/$fs"; mount --make-rslave "$1/$fs"; mounted+=("$1/$fs"); }
  done
}
cleanup() { for fs in "${mounted[@]}"; do umount -l "$fs" || true; done; }
trap cleanup EXIT

inside() {  # folder, command: a login's environment, not ours
  local where=$1; shift
  chroot "$where" /usr/bin/env -i HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
    PIP_CERT=/etc/ssl/certs/ca-certificates.crt bash -c "$*"
}

step() { printf '\n== %s (%s s since start)\n' "$1" "$SECONDS"; }

step "bootstrap $root/build"
mkdir -p "$root"
bootstrap "$root/build"
enter "$root/build"
rm -rf "$root/build/src" && git clone -q "$project" "$root/build/src"
# The README's reader has git; a minimal chroot has not even certificates.
inside "$root/build" "apt-get update -qq && apt-get install -y -qq --no-install-recommends git ca-certificates >/dev/null && update-ca-certificates >/dev/null 2>&1; git config --global --add safe.directory /src"

for name in "${steps[@]}"; do
  case "$name" in
    demo) step "./run demo"; inside "$root/build" "cd /src && ./run demo" ;;
    test) step "./run test"; inside "$root/build" "cd /src && ./run test" ;;
    image)
      step "cpu.Dockerfile, stage build"
      inside "$root/build" "cd /src && docker/install-deps.sh build"
      inside "$root/build" "cd /src && cmake --preset release -DALTIPLANO_TESTS=OFF -DALTIPLANO_CUDA=OFF -DALTIPLANO_COMMIT=$COMMIT && ninja -C build/release altiplano && strip build/release/altiplano" >/dev/null
      step "cpu.Dockerfile, stage runtime"
      bootstrap "$root/runtime"
      enter "$root/runtime"
      install -D docker/install-deps.sh "$root/runtime/tmp/install-deps.sh"
      inside "$root/runtime" "/tmp/install-deps.sh runtime && rm -rf /tmp/install-deps.sh /var/lib/apt/lists/*"
      install "$root/build/src/build/release/altiplano" "$root/runtime/usr/local/bin/altiplano"
      rm -rf "$root/runtime/model" && cp -r tests/data/tiny "$root/runtime/model"
      inside "$root/runtime" 'setpriv --reuid 65532 --regid 0 --clear-groups altiplano version
        setpriv --reuid 65532 --regid 0 --clear-groups altiplano serve --model /model --listen 127.0.0.1:50951 > /tmp/out & server=$!
        for i in $(seq 100); do grep -q ^READY /tmp/out && break; sleep 0.1; done
        cat /tmp/out; altiplano health --url 127.0.0.1:50951; kill -TERM $server; wait $server; echo "exit code $?"'
      ;;
    *) echo "unknown step $name" >&2; exit 64 ;;
  esac
done
step "done"
