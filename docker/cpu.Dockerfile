# Altiplano on CPUs. From the project's root:
#   docker build -f docker/cpu.Dockerfile --build-arg COMMIT=$(git rev-parse --short=12 HEAD) -t altiplano:cpu .
#   docker run --rm -p 127.0.0.1:50051:50051 -v /path/to/model:/model:ro altiplano:cpu
# docker/check-dockerfiles.sh keeps these lines and docker/chroot-test.sh in step.

FROM debian:12-slim AS build
WORKDIR /src
COPY docker/install-deps.sh docker/install-deps.sh
RUN docker/install-deps.sh build
COPY . .
ARG COMMIT=unknown
RUN cmake --preset release -DALTIPLANO_TESTS=OFF -DALTIPLANO_CUDA=OFF -DALTIPLANO_COMMIT=$COMMIT && ninja -C build/release altiplano && strip build/release/altiplano

FROM debian:12-slim AS runtime
COPY docker/install-deps.sh /tmp/install-deps.sh
RUN /tmp/install-deps.sh runtime && rm -rf /tmp/install-deps.sh /var/lib/apt/lists/*
COPY --from=build /src/build/release/altiplano /usr/local/bin/altiplano
COPY LICENSE /usr/share/doc/altiplano/LICENSE
LABEL org.opencontainers.image.title="altiplano" org.opencontainers.image.licenses="Apache-2.0"
USER 65532:0
EXPOSE 50051
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD ["altiplano", "health", "--url", "127.0.0.1:50051"]
ENTRYPOINT ["altiplano"]
CMD ["serve", "--model", "/model", "--listen", "0.0.0.0:50051"]
