#!/usr/bin/env bash
# Makes a tree of QEMU 11.1 from Debian's unstable suite, beside whatever QEMU the machine has. Safe to run any number
# of times: when the tree is there it does nothing and touches no network.
#
#   deploy/qemu-11.sh [DIRECTORY]      default: build/qemu-11.1 beside this script's folder
#   DIRECTORY/bin/qemu-system-x86_64   runs it, with the loader, libraries and data files of the tree
#
# Nothing is installed into the system, no root is needed, and nothing is mounted or chrooted, now or at run time: the
# packages are unpacked and the wrapper names their loader. LD_PRELOAD works through it. The packages come from the
# mirror that the machine's own apt sources name, into an apt state of their own, and their signature is checked.
#
# Exit status 69 (EX_UNAVAILABLE) and one sentence: it cannot be had on this machine.
set -euo pipefail
export LC_ALL=C

readonly WANTED=11.1 SUITE=sid PACKAGE=qemu-system-x86
readonly KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
. "$(dirname "${BASH_SOURCE[0]}")/apt-sources.sh"

say() { printf 'qemu-11: %s\n' "$*"; }
die() { printf 'qemu-11: %s\n' "$*" >&2; exit 1; }
unavailable() { printf 'qemu-11: QEMU %s cannot be had here: %s\n' "$WANTED" "$*" >&2; exit 69; }

version_of() { "$1" --version 2>/dev/null | sed -n '1s/.*version \([0-9][0-9.]*\).*/\1/p'; }
is_made() { case $(version_of "$1/bin/qemu-system-x86_64") in "$WANTED".*) ;; *) return 1 ;; esac }

# An apt that knows nothing of this system: no installed package counts, no source but the one we name.
write_apt_configuration() { # $1 = work directory, $2 = URI
    local work=$1
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
    : >"$work/status"
    printf '%s\n' "Types: deb" "URIs: $2" "Suites: $SUITE" "Components: main" "Architectures: amd64" \
        "Signed-By: $KEYRING" >"$work/suite.sources"
    cat >"$work/apt.conf" <<END
Dir::State "$work";
Dir::State::status "$work/status";
Dir::Cache "$work/cache";
Dir::Etc::SourceList "$work/suite.sources";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::Log "$work";
APT::Architecture "amd64";
APT::Architectures "amd64";
APT::Sandbox::User "";
APT::Install-Recommends "false";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::Retries "2";
pkgCacheGen::Essential "none";
# The suite's index may look expired against this machine's clock. Who signed it is checked all the same.
Acquire::Check-Valid-Until "false";
END
}

apt_quietly() { # $1 = work directory; the rest goes to apt-get
    local work=$1 reason
    shift
    APT_CONFIG="$work/apt.conf" apt-get -q -y "$@" >"$work/log" 2>&1 </dev/null && return 0
    reason=$(grep -m 1 '^E:' "$work/log" || tail -n 1 "$work/log")
    unavailable "${reason#E: }"
}

unpack() { # $1 = directory with .deb files, $2 = tree
    local file
    for file in "$1"/*.deb; do
        dpkg-deb -x "$file" "$2" || die "$file cannot be unpacked"
    done
    # Programs name their libraries by the old places, which are the same as these in a merged /usr.
    for file in bin lib lib64; do
        [ -e "$2/$file" ] || ln -s "usr/$file" "$2/$file"
    done
    rm -rf "$2/usr/share/doc" "$2/usr/share/man" "$2/usr/share/locale"
}

write_wrapper() { # $1 = directory
    mkdir -p "$1/bin"
    cat >"$1/bin/qemu-system-x86_64" <<'END'
#!/bin/sh
# QEMU of the tree beside this file, with the tree's own loader and libraries (made by deploy/qemu-11.sh).
tree=$(CDPATH= cd -- "$(dirname -- "$(readlink -f -- "$0")")/../root" && pwd -P) || exit 127
libraries=$tree/usr/lib/x86_64-linux-gnu
export QEMU_MODULE_DIR="$libraries/qemu"
exec "$tree/usr/lib64/ld-linux-x86-64.so.2" --inhibit-cache --library-path "$libraries:$libraries/systemd" \
    "$tree/usr/bin/qemu-system-x86_64" -L "$tree/usr/share/qemu" -L "$tree/usr/share/seabios" \
    -L "$tree/usr/lib/ipxe/qemu" "$@"
END
    chmod 0755 "$1/bin/qemu-system-x86_64"
}

make_tree() { # $1 = directory
    local target=$1 release uri work
    [ "$(uname -m)" = x86_64 ] || unavailable "this machine is $(uname -m), the packages are for x86_64"
    { command -v apt-get && command -v dpkg-deb; } >/dev/null || unavailable "it comes as Debian packages, and there is no apt-get here"
    [ -r "$KEYRING" ] || unavailable "$KEYRING is missing, so nobody could check who made the packages"
    release=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
    uri=$(uri_of_suite "${release:-none}") ||
        unavailable "no apt source for ${release:-this system} was found in $APT_DIR to take the mirror from"

    mkdir -p "$(dirname "$target")"
    exec 9>"$target.lock"
    flock -w 300 9 || die "somebody else has been making $target for five minutes"
    if is_made "$target"; then return 0; fi
    work=$(mktemp -d "$target.XXXXXX")
    # shellcheck disable=SC2064 # the directory as it is named now
    trap "rm -rf '$work'" EXIT
    trap 'exit 1' HUP INT TERM

    say "making $target (about 45 MB from $SUITE)"
    write_apt_configuration "$work" "$uri"
    apt_quietly "$work" update
    local candidate
    candidate=$(APT_CONFIG="$work/apt.conf" apt-cache show --no-all-versions "$PACKAGE" 2>/dev/null | sed -n 's/^Version: *\([0-9]*:\)\{0,1\}//p')
    case $candidate in
    "$WANTED".*) ;;
    *) unavailable "$SUITE has ${candidate:-no $PACKAGE} now" ;;
    esac
    apt_quietly "$work" install --download-only "$PACKAGE"
    mkdir "$work/made"
    unpack "$work/cache/archives" "$work/made/root"
    write_wrapper "$work/made"
    is_made "$work/made" || die "what was unpacked does not run: $("$work/made/bin/qemu-system-x86_64" --version 2>&1 | tail -n 1)"
    rm -rf "$target"
    chmod 0755 "$work/made"
    mv "$work/made" "$target"
    say "done: $target/bin/qemu-system-x86_64 is QEMU $(version_of "$target/bin/qemu-system-x86_64")"
}

main() {
    local target
    case "${1:-}" in
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    -*) die "unknown argument '$1' (see --help)" ;;
    esac
    [ $# -le 1 ] || die "one directory at most (see --help)"
    target=${1:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/build/qemu-$WANTED}
    case $target in /*) ;; *) target=$PWD/$target ;; esac
    if is_made "$target"; then
        say "$target is there already"
        return 0
    fi
    make_tree "$target"
}

main "$@"
