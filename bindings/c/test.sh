#!/usr/bin/env bash
# Builds a C program against the installed header and libraries, shared and static, runs both, and the static one under
# valgrind, which must find no leak and no invalid access. Fails if the committed header is not the generated one.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for tool in cc pkg-config valgrind; do
  command -v "$tool" > /dev/null || { echo "missing: $tool" >&2; exit 1; }
done
cp "$here/include/mainstay.h" "$work/committed.h"
"$here/install.sh" "$work/prefix" dev
diff -u "$work/committed.h" "$here/include/mainstay.h" || { echo "include/mainstay.h was not up to date" >&2; exit 1; }
export PKG_CONFIG_PATH=$work/prefix/lib/pkgconfig
flags="-std=c11 -Wall -Wextra -Werror $(pkg-config --cflags mainstay)"
# shellcheck disable=SC2086
cc $flags "$here/tests/roundtrip.c" -o "$work/shared" $(pkg-config --libs mainstay)
# shellcheck disable=SC2086
cc $flags "$here/tests/roundtrip.c" -o "$work/static" "$work/prefix/lib/libmainstay.a" -lpthread -ldl -lm
LD_LIBRARY_PATH=$work/prefix/lib "$work/shared" "$work/data-shared"
"$work/static" "$work/data-static"
valgrind --quiet --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite --show-leak-kinds=definite "$work/static" "$work/data-valgrind"
echo "c interface: 3 passed, 0 failed"
