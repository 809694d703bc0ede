#!/usr/bin/env bash
# Fetches promtool out of Debian's package `prometheus`, beside whatever the machine has. Installs nothing, needs no root;
# the package is checked by apt against the machine's own sources. Done already: does nothing.
#
#   deploy/monitoring/promtool.sh [DIRECTORY]   default: build/promtool; prints the program's path
#
# Exit status 69 (EX_UNAVAILABLE) and one sentence: it cannot be had on this machine.
set -euo pipefail
export LC_ALL=C

directory=${1:-$(dirname "${BASH_SOURCE[0]}")/../../build/promtool}
unavailable() { printf 'promtool: it cannot be had here: %s\n' "$*" >&2; exit 69; }

if program=$(command -v promtool); then printf '%s\n' "$program"; exit 0; fi
if [ ! -x "$directory/promtool" ]; then
    command -v apt-get >/dev/null || unavailable "this is no Debian"
    mkdir -p "$directory"
    work=$(mktemp -d "$directory/.fetch.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    (cd "$work" && apt-get -q -o APT::Sandbox::User= download prometheus) >"$work/log" 2>&1 ||
        unavailable "$(grep -m 1 '^E:' "$work/log" || tail -n 1 "$work/log")"
    dpkg-deb -x "$work"/prometheus_*.deb "$work/root"
    mv "$work/root/usr/bin/promtool" "$directory/promtool"
fi
printf '%s\n' "$directory/promtool"
