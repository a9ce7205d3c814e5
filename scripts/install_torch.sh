#!/bin/sh
# Installs the torch build that suits this machine. Called by the Makefile with PIP, TORCH (torch==X), TORCH_INDEX and CPU_INDEX set.
set -eu

if [ -n "$TORCH_INDEX" ]; then
    exec $PIP --extra-index-url "$TORCH_INDEX" "$TORCH"
fi
if command -v nvidia-smi >/dev/null 2>&1 || [ "$(uname -s)" != Linux ]; then
    # with a GPU the usual build is right; other systems have no CUDA build
    exec $PIP "$TORCH"
fi
# `+cpu` is the CPU build, wherever pip is set up to look; asked first, so that a machine with its own mirror needs nothing from outside
if $PIP "$TORCH+cpu" 2>/dev/null || $PIP --extra-index-url "$CPU_INDEX" "$TORCH+cpu"; then
    exit 0
fi
echo "no CPU build of $TORCH was found; installing the usual build, which is large and runs on a CPU as well" >&2
exec $PIP "$TORCH"
