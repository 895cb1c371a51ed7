#!/usr/bin/env bash
# Builds the one static binary of the image, proves that it runs with nothing beside it, and builds the image where podman or
# docker is there.
# usage: deploy/image.sh [PROFILE]        the default, `dist`, is what is shipped
set -euo pipefail
cd "$(dirname "$0")/.."
profile=${1:-dist}
target=$(uname -m)-unknown-linux-musl
compiler=$(uname -m)-linux-musl-gcc
if ! command -v "$compiler" >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update --quiet
        DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends musl-tools
    else
        echo "missing: $compiler, which the allocator is compiled with; install it with: apt-get update && apt-get install musl-tools" >&2
        exit 2
    fi
fi
rustup target add "$target"
cargo build --profile "$profile" --target "$target" --package mainstay-server --bin mainstay
folder=${CARGO_TARGET_DIR:-target}/$target/$([ "$profile" = dev ] && echo debug || echo "$profile")
ls -l "$folder/mainstay"
deploy/from_scratch.sh "$folder/mainstay"
builder=$(command -v podman || command -v docker || true)
if [ -n "$builder" ]; then
    "$builder" build --file deploy/Containerfile --tag mainstay:0.1.0 "$folder"
else
    echo "neither podman nor docker is there: no image was built from $folder"
fi
