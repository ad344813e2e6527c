#!/bin/sh
# Rewrites requirements/engine-cpu.txt and requirements/dev.txt from their .in files.
#
#     tools/pin_requirements.sh              keeps every pin that still fits the .in files
#     tools/pin_requirements.sh --upgrade    takes the newest of everything
#
# Needs uv, and nothing else in this repository does. What torch itself pins of CUDA is left out of
# the list: pip adds it where the torch it finds is a CUDA build.
set -eu
cd "$(dirname "$0")/../requirements"

resolve() {
    uv pip compile --quiet --no-header --no-annotate --python-version 3.11 \
        --python-platform x86_64-manylinux_2_34 "$@" >/dev/null
}

# with_header FILE PINS: FILE's leading comment lines, then PINS.
with_header() {
    sed '/^#/!Q' "$1" >"$1.new"
    cat "$2" >>"$1.new"
    mv "$1.new" "$1"
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cp engine-cpu.txt "$work/engine"
resolve engine-cpu.in --override not-on-cpu.txt --output-file "$work/engine" "$@"
grep -vE '^(sglang==|nvidia-|cuda-)' "$work/engine" | sed 's/+cpu$//' >"$work/engine.pins"
with_header engine-cpu.txt "$work/engine.pins"

# dev.txt is resolved against the engine's pins and lists only what they lack.
cp dev.txt "$work/dev"
resolve dev.in --constraint "$work/engine.pins" --output-file "$work/dev" "$@"
grep -vxFf "$work/engine.pins" "$work/dev" >"$work/dev.pins"
with_header dev.txt "$work/dev.pins"
