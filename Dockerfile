# Images for those who have a container engine; `cargo xtask image` needs none. It builds smaller ones, whose digests repeat.
#   docker build --target agent -t weft/agent .
#   docker build --target control -t weft/control .
FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo xtask build --release \
 && strip --strip-debug target/release/mesh-agent target/release/mesh-control target/release/weft

FROM gcr.io/distroless/cc-debian12 AS agent
COPY --from=build /src/target/release/mesh-agent /src/target/release/weft /
ENTRYPOINT ["/mesh-agent"]

FROM gcr.io/distroless/cc-debian12 AS control
COPY --from=build /src/target/release/mesh-control /
USER 65532:65532
ENTRYPOINT ["/mesh-control"]
