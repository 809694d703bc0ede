#!/bin/sh
# Builds the guest image: build.sh OUTPUT. Needs gcc and ld only (no 32-bit libraries). Writes nothing beside itself.
set -eu
[ $# -eq 1 ] || { echo "usage: build.sh OUTPUT" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$(dirname "$1")"
work=$(mktemp -d "$(dirname "$1")/.guest.XXXXXX")
trap 'rm -rf "$work"' EXIT
gcc -m32 -march=i686 -O2 -Wall -Wextra -Werror -ffreestanding -fno-pic -fno-pie -fno-stack-protector -mno-sse -mno-mmx \
    -mgeneral-regs-only -fno-asynchronous-unwind-tables -c "$here/guest.c" -o "$work/guest.o"
gcc -m32 -c "$here/start.S" -o "$work/start.o"
ld -m elf_i386 --no-warn-rwx-segments -T "$here/guest.ld" -z noexecstack --build-id=none -o "$work/guest.elf" "$work/start.o" "$work/guest.o"
mv "$work/guest.elf" "$1"
