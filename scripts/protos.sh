#!/usr/bin/env bash
# Generates the Python stubs beside the .proto files, or checks them. Run through make: `make protos`, `make check`.
#
#   scripts/protos.sh generate   write protos/drover/v1/*_pb2*
#   scripts/protos.sh check      fail if the stubs in the tree are not what the .proto files give
#   scripts/protos.sh lint       buf's rules on the .proto files
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
readonly dir=protos/drover/v1

# The generator's plugins are programs beside its Python; google/rpc and google/api come from googleapis-common-protos.
protoc() {
    PATH="$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc -I . -I "$site" "$@" "$dir"/*.proto
}

generate() { # into the tree at $1
    protoc --python_out="$1" --grpc_python_out="$1" --mypy_out="quiet:$1" --mypy_grpc_out="quiet:$1"
}

site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

case "${1:-}" in
generate)
    generate "$work" # first aside: a mistake in a .proto leaves the old stubs as they were
    rm -f "$dir"/*_pb2*
    cp "$work/$dir"/*_pb2* "$dir/"
    ;;
check)
    generate "$work"
    if ! diff -ru --exclude='*.proto' --exclude=__pycache__ "$dir" "$work/$dir" >"$work/difference"; then
        head -n 30 "$work/difference"
        echo "protos: the stubs in $dir are not what its .proto files give: run 'make protos' and commit the result." >&2
        exit 1
    fi
    ;;
lint)
    # An image with its imports in it, made by the same protoc, so that buf need not find google/* itself.
    protoc --include_imports --include_source_info --descriptor_set_out="$work/image.binpb"
    "$venv/bin/buf" lint "$work/image.binpb" --config buf.yaml --path protos
    ;;
*)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
    ;;
esac
