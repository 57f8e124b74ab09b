# syntax=docker/dockerfile:1
# tier-plan in a small image:
#
#   docker build -t tier-plan .
#   docker run --rm tier-plan demo -o /tmp/demo
#   docker run --rm -p 127.0.0.1:8080:8080 -e TIER_PLAN_API_KEY=KEY -v "$PWD/models:/models:ro" tier-plan \
#       serve /models/MODEL.gguf --host 0.0.0.0

FROM rust:1.95-slim-bookworm AS build
WORKDIR /source
COPY . .
# A released program doesn't look for its files where it was built.
ENV TIER_PLAN_RELEASE=1 CARGO_PROFILE_RELEASE_DEBUG=false CARGO_PROFILE_RELEASE_STRIP=true
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/source/target \
    cargo build --release --locked -p tier-plan-planner --bin tier-plan \
    && install -D target/release/tier-plan /install/bin/tier-plan \
    && target/release/tier-plan man /install/share/man/man1

FROM debian:bookworm-slim
COPY --from=build /install /usr/local
COPY LICENSE-APACHE LICENSE-MIT /usr/local/share/doc/tier-plan/
RUN useradd --uid 10001 --create-home --home-dir /home/tier-plan tier-plan
USER 10001:10001
WORKDIR /home/tier-plan
# For GPUs: what NVIDIA's container runtime is asked for.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
EXPOSE 8080
# Of a server that loads, the state is "starting" for up to an hour. bash speaks HTTP well enough for this question.
HEALTHCHECK --interval=10s --timeout=5s --start-period=1h --start-interval=5s --retries=3 \
    CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/${TIER_PLAN_PORT:-8080} && printf 'GET /health HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n' >&3 && read -r _ status _ <&3 && [ \"$status\" = 200 ]"]
ENTRYPOINT ["tier-plan"]
CMD ["--help"]
