#!/usr/bin/env bash
# Makes a tree of libvirt from this machine's own apt sources, for tests: libvirt.sh DIRECTORY. Nothing is installed:
# packages are fetched by apt (which checks who signed them) and unpacked, and no service is started.
#
#   DIRECTORY/root                     what the packages hold; libvirt-host.sh starts daemons from it
#   DIRECTORY/bin/virsh                runs with the libraries of the tree
#
# Exit status 69 (EX_UNAVAILABLE) and one sentence: it cannot be had on this machine.
set -euo pipefail
export LC_ALL=C

readonly FETCH_S=120
readonly PACKAGES="libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients python3-libvirt"

die() { printf 'libvirt: %s\n' "$*" >&2; exit 1; }
unavailable() { printf 'libvirt: it cannot be had here: %s\n' "$*" >&2; exit 69; }

# What the daemon needs to come up: systemd and what only a whole system wants stay out.
wanted() {
    sed -n 's/^Inst \([^ ]*\) .*/\1/p' | grep -v -E '^(systemd|systemd-.*|libnss-.*|libpam-.*|.*-dev|python3|python3\..*|python3-minimal|libpython.*)$' || true
}

main() {
    [ $# -eq 1 ] || die "usage: libvirt.sh DIRECTORY"
    local target=$1 missing file offered release=()
    case $target in /*) ;; *) target=$PWD/$target ;; esac
    if "$target/bin/virsh" --version >/dev/null 2>&1; then return 0; fi
    { command -v apt-get && command -v dpkg-deb; } >/dev/null || unavailable "it comes as Debian packages, and there is no apt-get here"
    mkdir -p "$(dirname "$target")"
    work=$(mktemp -d "$target.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    # As new as QEMU: the daemon of an older release does not know the machine types of a backported QEMU.
    offered=$(apt-cache policy libvirt-daemon 2>/dev/null | sed -n 's/.* \([a-z]*-backports\)\/main.*/\1/p' | sort -u)
    [ -z "$offered" ] || release=(-t "${offered%%$'\n'*}")
    # shellcheck disable=SC2086 # a list of words on purpose
    missing=$(apt-get -s -qq "${release[@]}" install --no-install-recommends $PACKAGES 2>/dev/null | wanted)
    case " $(echo $missing) " in *" libvirt-daemon "*) ;; *) unavailable "the apt sources of this machine have no libvirt-daemon" ;; esac
    mkdir -p "$work"/packages "$work"/root/{usr,etc,var}
    # shellcheck disable=SC2086 # likewise
    (cd "$work/packages" && timeout "$FETCH_S" apt-get -q -o APT::Sandbox::User= "${release[@]}" download $missing >"$work/log" 2>&1 </dev/null) ||
        unavailable "$(grep -m 1 '^E:' "$work/log" || tail -n 1 "$work/log")"
    for file in "$work"/packages/*.deb; do
        dpkg-deb -x "$file" "$work/root" || die "$file cannot be unpacked"
    done
    mkdir "$work/bin"
    cat >"$work/bin/virsh" <<'END'
#!/bin/sh
root=$(CDPATH= cd -- "$(dirname -- "$(readlink -f -- "$0")")/../root" && pwd -P) || exit 127
export LD_LIBRARY_PATH="$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu"
exec "$root/usr/bin/virsh" "$@"
END
    chmod 0755 "$work/bin/virsh"
    "$work/bin/virsh" --version >/dev/null 2>&1 || unavailable "its client does not run here"
    rm -rf "$target" "$work/packages"
    chmod 0755 "$work"
    mv "$work" "$target"
}

main "$@"
