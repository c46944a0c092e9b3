#!/usr/bin/env bash
# No container engine runs in CI, so the Dockerfiles are held to the lines that the chroot test does run.
set -euo pipefail
cd "$(dirname "$0")/.."
bad=0
need() {  # file, fixed text, why
  grep -qF -- "$2" "$1" || { echo "$1 lacks: $2 ($3)"; bad=1; }
}
for file in docker/cpu.Dockerfile docker/cuda.Dockerfile; do
  need "$file" "RUN docker/install-deps.sh build" "the one install script"
  need "$file" "RUN /tmp/install-deps.sh runtime && rm -rf /tmp/install-deps.sh /var/lib/apt/lists/*" "runtime image holds only what runs"
  need "$file" "USER 65532:0" "not root"
  need "$file" 'HEALTHCHECK' "health by the program itself"
  need "$file" '"altiplano", "health"' "health by the program itself"
  need "$file" 'ENTRYPOINT ["altiplano"]' "exec form: signals arrive"
  [ "$(grep -c '^FROM .* AS ' "$file")" -eq 2 ] || { echo "$file: two named stages expected"; bad=1; }
  if grep -nE '^FROM [^ ]*(:latest|^[^:]+) ' "$file"; then echo "$file: pin the base image"; bad=1; fi
done
build_line=$(sed -n 's/^RUN \(cmake --preset release.*\)$/\1/p' docker/cpu.Dockerfile)
[ -n "$build_line" ] || { echo "docker/cpu.Dockerfile: no build line"; bad=1; }
need docker/chroot-test.sh "$build_line" "the chroot test runs the Dockerfile's build line"
need docker/cuda.Dockerfile "${build_line/ALTIPLANO_CUDA=OFF/ALTIPLANO_CUDA=ON}" "the same build with CUDA"
need docker/chroot-test.sh "/tmp/install-deps.sh runtime && rm -rf /tmp/install-deps.sh /var/lib/apt/lists/*" "the same runtime stage"
for script in docker/*.sh docker/*.sbatch run .ci/run; do bash -n "$script" || bad=1; done
[ $bad -eq 0 ] && echo "Dockerfiles: ok"
exit $bad
