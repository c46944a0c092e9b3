# Altiplano with the CUDA side, on NVIDIA's CUDA 13 base (driver 580 or newer). From the project's root:
#   docker build -f docker/cuda.Dockerfile --build-arg COMMIT=$(git rev-parse --short=12 HEAD) -t altiplano:cuda .
# --device cuda has run in a simulator only (docs/kernels.md); without it the CPU computes.
# docker/check-dockerfiles.sh keeps these lines and docker/chroot-test.sh in step.

FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build
WORKDIR /src
COPY docker/install-deps.sh docker/install-deps.sh
RUN docker/install-deps.sh build
COPY . .
ARG COMMIT=unknown
RUN cmake --preset release -DALTIPLANO_TESTS=OFF -DALTIPLANO_CUDA=ON -DALTIPLANO_COMMIT=$COMMIT && ninja -C build/release altiplano && strip build/release/altiplano

# The variant with libraries: cuBLASLt is loaded when the program runs (docs/adr/0006-cublaslt-by-dlopen.md).
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04 AS runtime
COPY docker/install-deps.sh /tmp/install-deps.sh
RUN /tmp/install-deps.sh runtime && rm -rf /tmp/install-deps.sh /var/lib/apt/lists/*
COPY --from=build /src/build/release/altiplano /usr/local/bin/altiplano
COPY LICENSE /usr/share/doc/altiplano/LICENSE
LABEL org.opencontainers.image.title="altiplano" org.opencontainers.image.licenses="Apache-2.0"
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 65532:0
EXPOSE 50051
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD ["altiplano", "health", "--url", "127.0.0.1:50051"]
ENTRYPOINT ["altiplano"]
CMD ["serve", "--model", "/model", "--listen", "0.0.0.0:50051"]
