#!/usr/bin/env bash
# Runs a replica of a static binary in a folder that holds this binary and nothing else, as an image from scratch does:
# birth, writes, status, SIGTERM, then every checksum of the volume.
# usage: deploy/from_scratch.sh BINARY        as root, for chroot
set -euo pipefail
binary=${1:?usage: deploy/from_scratch.sh BINARY}
if readelf --program-headers "$binary" | grep -q INTERP; then
    echo "$binary asks for a dynamic loader: it is not static" >&2
    exit 1
fi
if [ "$(id -u)" != 0 ]; then
    echo "not root: $binary is static, but was not run by itself"
    exit 0
fi
root=$(mktemp -d)
pid=
# The process is ours, started below.
trap '[ -z "$pid" ] || kill -KILL "$pid" 2>/dev/null || true; rm -rf "$root"' EXIT
chmod 0755 "$root"
install -m 0755 "$binary" "$root/mainstay"
mkdir -m 0700 "$root/data"
chown 10001:10001 "$root/data"
inside() { chroot --userspec=10001:10001 "$root" /mainstay "$@"; }
# Ports that nobody has now. The kernel gives out others meanwhile, so this is good enough for a check.
read -r client peer admin metrics < <(python3 - <<'PY'
import socket
sockets = [socket.socket() for _ in range(4)]
for s in sockets:
    s.bind(("127.0.0.1", 0))
print(*[s.getsockname()[1] for s in sockets])
PY
)
chroot --userspec=10001:10001 "$root" /mainstay serve --data /data/volume --name n1 --peers "n1=127.0.0.1:$peer" \
    --listen "127.0.0.1:$client" --listen-admin "127.0.0.1:$admin" --listen-metrics "127.0.0.1:$metrics" 2>"$root/log" &
pid=$!
fail() {
    echo "$1" >&2
    tail -20 "$root/log" >&2
    exit 1
}
inside init --members n1 --admin "127.0.0.1:$admin" || fail "init failed"
inside bench --workload put --ops 500 --clients 8 --endpoints "127.0.0.1:$client" || fail "the writes failed"
inside status --admin "127.0.0.1:$admin" || fail "status failed"
kill -TERM "$pid"
wait "$pid" || fail "the replica did not end in good order"
pid=
inside verify --data /data/volume || fail "the volume is not whole"
echo "from scratch: 1 passed, 0 failed"
