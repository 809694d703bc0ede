#!/usr/bin/env bash
# Makes the Linux test guest: build.sh DIRECTORY writes DIRECTORY/{linux-vmlinuz,linux-initrd}. Safe to run any number of
# times: when both are newer than their sources it does nothing and touches no network.
#
# The kernel is the newest "cloud" kernel that this machine's own apt sources have; its package is fetched by apt (which
# checks who signed it) and unpacked, not installed, and no root is needed. Needs gcc and libc's static library.
#
# Exit status 69 (EX_UNAVAILABLE) and one sentence: it cannot be had on this machine. Tests and demo do without it then.
set -euo pipefail
export LC_ALL=C

readonly META=linux-image-cloud-amd64 FETCH_S=300
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here

say() { printf 'linux-guest: %s\n' "$*"; }
die() { printf 'linux-guest: %s\n' "$*" >&2; exit 1; }
unavailable() { printf 'linux-guest: the Linux test guest is left out: %s\n' "$*" >&2; exit 69; }

is_made() {
    local source
    [ -s "$1/linux-vmlinuz" ] && [ -s "$1/linux-initrd" ] || return 1
    for source in probe.c pack.py build.sh; do
        [ "$1/linux-initrd" -nt "$here/$source" ] || return 1
    done
}

kernel_package() { apt-cache depends "$META" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1; }

# The package stays beside what is made of it, so that another probe costs no download.
fetch_kernel() { # $1 = directory; prints the file
    local package reason=""
    package=$(kernel_package)
    if [ -z "$package" ] && [ "$(id -u)" = 0 ]; then
        timeout "$FETCH_S" apt-get -qq update >/dev/null 2>&1 </dev/null || true
        package=$(kernel_package)
    fi
    [ -n "$package" ] || unavailable "the apt sources of this machine have no $META"
    mkdir -p "$1/packages"
    if ! compgen -G "$1/packages/${package}_*.deb" >/dev/null; then
        say "fetching $package (about 27 MB)" >&2
        rm -f "$1"/packages/*
        reason=$(cd "$1/packages" && timeout "$FETCH_S" apt-get -q -o APT::Sandbox::User= download "$package" 2>&1 </dev/null) ||
            unavailable "$package could not be fetched: $(grep -m 1 '^E:' <<<"$reason" || tail -n 1 <<<"$reason")"
    fi
    compgen -G "$1/packages/${package}_*.deb" | head -n 1
}

main() {
    [ $# -eq 1 ] || die "usage: build.sh DIRECTORY (what to write into, e.g. build/linux)"
    local out=$1 deb
    if is_made "$out"; then return 0; fi
    [ "$(uname -m)" = x86_64 ] || unavailable "this machine is $(uname -m), the kernel is for x86_64"
    { command -v apt-get && command -v dpkg-deb; } >/dev/null || unavailable "its kernel comes as a Debian package, and there is no apt-get here"
    command -v gcc >/dev/null || die "gcc is missing: run deploy/install-system.sh"
    mkdir -p "$out"
    exec 9>"$out.lock"
    flock -w "$FETCH_S" 9 || die "somebody else has been making $out for five minutes"
    if is_made "$out"; then return 0; fi
    work=$(mktemp -d "$out.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    trap 'exit 1' HUP INT TERM

    gcc -O2 -std=gnu11 -static -pthread -s -Wall -Wextra -Werror -o "$work/probe" "$here/probe.c"
    deb=$(fetch_kernel "$out") || exit $?
    dpkg-deb -x "$deb" "$work/tree" || { rm -f "$deb"; die "$deb cannot be unpacked; it was removed, try again"; }
    "${PYTHON:-python3}" "$here/pack.py" "$work/tree" "$work/probe" "$work/initrd"
    cp "$work"/tree/boot/vmlinuz-* "$work/vmlinuz"
    chmod 0644 "$work/vmlinuz" "$work/initrd"
    # The initrd last: it is what tells that both are there.
    mv -f "$work/vmlinuz" "$out/linux-vmlinuz"
    mv -f "$work/initrd" "$out/linux-initrd"
    say "made $out from $(basename "$deb")"
}

main "$@"
