#!/bin/sh
# Build what gives QEMU devices on a machine without VFIO: build.sh OUT. Needs gcc. Does nothing when OUT is newer than
# its source; OUT appears whole or not at all, so a QEMU may be started beside a running build.
set -eu

fail() { echo "vfio preload: $*" >&2; exit 1; }

[ $# -eq 1 ] || fail "usage: build.sh OUT (the shared library to write, e.g. build/vfio-preload.so)"
out=$1
here=$(cd "$(dirname "$0")" && pwd)

if [ -f "$out" ] && [ "$out" -nt "$here/preload.c" ] && [ "$out" -nt "$here/build.sh" ]; then
    exit 0
fi
command -v gcc >/dev/null || fail "gcc is missing: install the package gcc"
mkdir -p "$(dirname "$out")"
work=$(mktemp "$out.XXXXXX")
trap 'rm -f "$work"' EXIT
trap 'exit 1' HUP INT TERM

# Without fortified sources: it stands in for functions that those would divert.
gcc -O2 -std=gnu11 -Wall -Wextra -Werror -fPIC -shared -fvisibility=hidden -U_FORTIFY_SOURCE \
    -o "$work" "$here/preload.c" -lpthread
chmod 0644 "$work"
mv -f "$work" "$out"
