#!/usr/bin/env bash
# Makes a tree of Open vSwitch from this machine's own apt sources, for tests: openvswitch.sh DIRECTORY. Nothing is
# installed: packages are fetched by apt (which checks who signed them) and unpacked, and no service is started.
#
#   DIRECTORY/bin/{ovs-vsctl,ovs-vswitchd,ovsdb-server,ovsdb-tool}   run with the libraries of the tree
#
# Exit status 69 (EX_UNAVAILABLE) and one sentence: it cannot be had on this machine.
set -euo pipefail
export LC_ALL=C

readonly PACKAGE=openvswitch-switch FETCH_S=120

die() { printf 'openvswitch: %s\n' "$*" >&2; exit 1; }
unavailable() { printf 'openvswitch: it cannot be had here: %s\n' "$*" >&2; exit 69; }

write_wrappers() { # $1 = directory
    local file
    mkdir -p "$1/bin"
    for file in usr/bin/ovs-vsctl usr/lib/openvswitch-switch/ovs-vswitchd usr/sbin/ovsdb-server usr/bin/ovsdb-tool; do
        [ -x "$1/root/$file" ] || unavailable "its packages have no $file"
        cat >"$1/bin/$(basename "$file")" <<END
#!/bin/sh
root=\$(CDPATH= cd -- "\$(dirname -- "\$(readlink -f -- "\$0")")/../root" && pwd -P) || exit 127
export LD_LIBRARY_PATH="\$root/usr/lib/x86_64-linux-gnu:\$root/lib/x86_64-linux-gnu"
exec "\$root/$file" "\$@"
END
        chmod 0755 "$1/bin/$(basename "$file")"
    done
}

main() {
    [ $# -eq 1 ] || die "usage: openvswitch.sh DIRECTORY"
    local target=$1 missing file
    case $target in /*) ;; *) target=$PWD/$target ;; esac
    if "$target/bin/ovs-vsctl" --version >/dev/null 2>&1; then return 0; fi
    { command -v apt-get && command -v dpkg-deb; } >/dev/null || unavailable "it comes as Debian packages, and there is no apt-get here"
    mkdir -p "$(dirname "$target")"
    work=$(mktemp -d "$target.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    missing=$(apt-get -s -qq install --no-install-recommends "$PACKAGE" 2>/dev/null | sed -n 's/^Inst \([^ ]*\) .*/\1/p')
    [ -n "$missing" ] || unavailable "the apt sources of this machine have no $PACKAGE"
    mkdir "$work/packages" "$work/root"
    # shellcheck disable=SC2086 # a list of words on purpose
    (cd "$work/packages" && timeout "$FETCH_S" apt-get -q -o APT::Sandbox::User= download $missing >"$work/log" 2>&1 </dev/null) ||
        unavailable "$(grep -m 1 '^E:' "$work/log" || tail -n 1 "$work/log")"
    for file in "$work"/packages/*.deb; do
        dpkg-deb -x "$file" "$work/root" || die "$file cannot be unpacked"
    done
    write_wrappers "$work"
    rm -rf "$target" "$work/packages"
    chmod 0755 "$work"
    mv "$work" "$target"
}

main "$@"
