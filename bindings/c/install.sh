#!/usr/bin/env bash
# Builds the C interface and installs header, static and shared library and pkg-config file: install.sh PREFIX [PROFILE]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
prefix=${1:?usage: install.sh PREFIX [PROFILE]}
profile=${2:-release}
target=${CARGO_TARGET_DIR:-$here/../../target}
(cd "$here" && cargo build --quiet --package mainstay-c --profile "$profile")
[ "$profile" = dev ] && profile=debug
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/../../Cargo.toml" | head -n 1)
install -d "$prefix/include" "$prefix/lib/pkgconfig"
install -m 644 "$here/include/mainstay.h" "$prefix/include/"
install -m 644 "$target/$profile/libmainstay.a" "$target/$profile/libmainstay.so" "$prefix/lib/"
sed -e "s|@prefix@|$prefix|" -e "s|@version@|$version|" "$here/mainstay.pc.in" > "$prefix/lib/pkgconfig/mainstay.pc"
