#!/bin/sh
# Build the guest image: build.sh OUT. Needs gcc for x86 and ld, no libraries. Does nothing when OUT is newer than its
# sources; OUT appears whole or not at all, so a guest may be started beside a running build.
set -eu

fail() { echo "guest image: $*" >&2; exit 1; }

[ $# -eq 1 ] || fail "usage: build.sh OUT (the ELF file to write, e.g. build/guest.elf)"
out=$1
here=$(cd "$(dirname "$0")" && pwd)

if [ -f "$out" ]; then
    stale=
    for source in guest.c start.S guest.ld build.sh; do
        [ "$out" -nt "$here/$source" ] || stale=yes
    done
    [ -n "$stale" ] || exit 0
fi

for tool in gcc ld; do
    command -v "$tool" >/dev/null || fail "$tool is missing: install the packages gcc and binutils"
done
case $(gcc -dumpmachine) in
    x86_64*|i?86*) ;;
    *) fail "gcc builds for $(gcc -dumpmachine), the guest needs a gcc for x86" ;;
esac

directory=$(dirname "$out")
mkdir -p "$directory"
work=$(mktemp -d "$directory/.guest.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

# Freestanding 32-bit code for any i686: no SSE (its state is not set up), no library calls (there is no library).
gcc -m32 -march=i686 -O2 -std=gnu11 -Wall -Wextra -Werror \
    -ffreestanding -fno-pic -fno-pie -fno-stack-protector -fcf-protection=none -fno-asynchronous-unwind-tables \
    -fno-tree-loop-distribute-patterns -mgeneral-regs-only \
    -c "$here/guest.c" -o "$work/guest.o"
gcc -m32 -c "$here/start.S" -o "$work/start.o"
ld -m elf_i386 -T "$here/guest.ld" -z noexecstack --no-warn-rwx-segments --build-id=none \
    -o "$work/guest.elf" "$work/start.o" "$work/guest.o"
chmod 0644 "$work/guest.elf"
mv -f "$work/guest.elf" "$out"
