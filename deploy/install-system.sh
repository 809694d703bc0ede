#!/usr/bin/env bash
# Installs the system packages that Drover needs, and nothing that is there already. Safe to run any number of times:
# when nothing is missing it says so and touches neither the network nor apt.
#
#   deploy/install-system.sh                install what is missing (root)
#   deploy/install-system.sh --check        only say what is missing; exit 1 if anything is
#   deploy/install-system.sh --only python  the Python part only (what `make check` needs)
#
# Debian 12 has QEMU 7.2, too old for the migration interfaces used here (8.2 to 11.1), so there QEMU comes from
# bookworm-backports, fetched from the mirror that the machine's own apt sources name. Debian 13 and Ubuntu 24.04
# have a QEMU that is new enough.
set -euo pipefail
export LC_ALL=C PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

readonly QEMU_OLDEST=8.2
. "$(dirname "${BASH_SOURCE[0]}")/apt-sources.sh"

say() { printf 'install-system: %s\n' "$*"; }
die() { printf 'install-system: %s\n' "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# --- what is needed: one function per part, true when it is there -------------------------------------------------------

qemu_version() { qemu-system-x86_64 --version 2>/dev/null | sed -n '1s/.*version \([0-9][0-9]*\.[0-9][0-9]*\).*/\1/p'; }
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

has_qemu() { local found; found=$(qemu_version) && [ -n "$found" ] && at_least "$found" "$QEMU_OLDEST"; }
has_qemu_utils() { have qemu-img; }
has_swtpm() { have swtpm; }
has_ovmf() { [ -e /usr/share/OVMF/OVMF_CODE_4M.fd ]; }
has_zookeeper() { [ -e /usr/share/java/zookeeper.jar ]; }
has_java() { have java; }
has_iproute() { have ip && have tc && have bridge; }
has_nft() { have nft; }
has_nsenter() { have nsenter && have unshare; }
has_gcc() { have gcc; }
has_libc_headers() { [ -e /usr/include/stdlib.h ]; }
has_binutils() { have ld && have as; }
has_make() { have make; }
has_venv() { "${PYTHON:-python3}" -c 'import ensurepip, venv' >/dev/null 2>&1; }

# part | package | group | why
readonly PARTS="\
qemu|qemu-system-x86|system|runs the guests and moves them, QEMU $QEMU_OLDEST or newer
qemu_utils|qemu-utils|system|makes images for guests' disks, of the same version as QEMU
swtpm|swtpm|system|emulates a TPM, for guests that have one
ovmf|ovmf|system|UEFI firmware, for guests that are started by it
zookeeper|libzookeeper-java|system|ZooKeeper, the record of who may run each guest: the jars, no service
java|default-jre-headless|system|runs ZooKeeper, without a desktop
iproute|iproute2|system|network namespaces, bridge and bandwidth limits of the simulated hosts
nft|nftables|system|cuts the network between hosts in tests
nsenter|util-linux|system|starts a process inside a host's namespace
gcc|gcc|system|builds the guest image
libc_headers|libc6-dev|system|headers for the small C helpers
binutils|binutils|system|links the guest image
make|make|system|runs the build
venv|python3-venv|python|makes the Python environment that holds everything else"

missing_parts() { # prints the lines of PARTS in group $1 (or of all groups) that are not there
    local part package group why
    while IFS='|' read -r part package group why; do
        if [ "$1" != all ] && [ "$1" != "$group" ]; then continue; fi
        "has_$part" || printf '%s|%s|%s|%s\n' "$part" "$package" "$group" "$why"
    done <<<"$PARTS"
}

packages_of() { cut -d'|' -f2 <<<"$1" | paste -sd' '; }
describe() { awk -F'|' '{ printf "%s%s (%s)", (NR > 1 ? "; " : ""), $2, $4 }' <<<"$1"; }

# --- Debian 12: where QEMU comes from -----------------------------------------------------------------------------------

add_backports() { # $1 = code name of the release
    local suite="$1-backports" uri
    if uri_of_suite "$suite" >/dev/null; then return 0; fi
    uri=$(uri_of_suite "$1") ||
        die "QEMU $QEMU_OLDEST or newer is missing and comes from $suite here, but no apt source for $1 was found in $APT_DIR to take the mirror from; add $suite yourself and run this again."
    say "adding apt source $suite (QEMU in $1 itself is too old)"
    printf '%s\n' "# Added by Drover's deploy/install-system.sh for QEMU $QEMU_OLDEST or newer." "Types: deb" "URIs: $uri" \
        "Suites: $suite" "Components: main" "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg" \
        >"$APT_DIR/sources.list.d/drover-backports.sources"
}

# --- installing ---------------------------------------------------------------------------------------------------------

apt_quietly() { # runs apt-get; when it fails, says the first reason that it gave
    local log
    log=$(mktemp)
    if DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -y "$@" >"$log" 2>&1 </dev/null; then
        rm -f "$log"
        return 0
    fi
    APT_REASON=$(grep -m 1 '^E:' "$log" || tail -n 1 "$log")
    APT_REASON=${APT_REASON#E: }
    rm -f "$log"
    return 1
}

install_missing() { # $1 = lines of PARTS
    local missing=$1 packages release suite="" still
    packages=$(packages_of "$missing")
    have apt-get || die "missing: $(describe "$missing"); this script knows Debian and Ubuntu only (no apt-get here), so install these by hand."
    [ "$(id -u)" = 0 ] || die "missing: $(describe "$missing"); run deploy/install-system.sh as root once to install them."
    while IFS='|' read -r _ package _ why; do say "installing $package: $why"; done <<<"$missing"

    release=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
    if [ "$release" = bookworm ] && grep -q '^qemu' <<<"$missing"; then
        add_backports "$release"
        suite="$release-backports"
    fi
    # The lists may be stale or absent for reasons that do not concern our packages, so the install decides; but when it
    # fails as well, this is most likely why (no network).
    local unrefreshed=""
    apt_quietly -o APT::Update::Error-Mode=any update || unrefreshed=" (apt could not refresh its lists: $APT_REASON)"
    if [ -n "$suite" ]; then
        local newer
        newer=$(tr ' ' '\n' <<<"$packages" | grep '^qemu-' | paste -sd' ')
        # shellcheck disable=SC2086 # a list of words on purpose
        apt_quietly install --no-install-recommends -t "$suite" $newer ||
            die "could not install $newer from $suite: $APT_REASON$unrefreshed"
        packages=$(tr ' ' '\n' <<<"$packages" | grep -v '^qemu-' | paste -sd' ' || true)
    fi
    if [ -n "$packages" ]; then
        # shellcheck disable=SC2086 # a list of words on purpose
        apt_quietly install --no-install-recommends $packages ||
            die "could not install $packages: $APT_REASON$unrefreshed"
    fi
    still=$(missing_parts "$2")
    [ -z "$still" ] || die "still missing after the packages went in: $(describe "$still")"
}

main() {
    local only=all check=no missing
    while [ $# -gt 0 ]; do
        case "$1" in
        --check) check=yes ;;
        --only)
            only=${2:-}
            case "$only" in system | python) shift ;; *) die "--only takes 'system' or 'python', not '$only'" ;; esac
            ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        *) die "unknown argument '$1' (see --help)" ;;
        esac
        shift
    done
    missing=$(missing_parts "$only")
    if [ -z "$missing" ]; then
        say "everything needed is installed"
        return 0
    fi
    [ "$check" = no ] || die "missing: $(describe "$missing"); run deploy/install-system.sh as root to install them."
    install_missing "$missing" "$only"
    say "done"
}

main "$@"
