#!/usr/bin/env bash
# Installs the one system package the project needs: the shared library of the Python that Triton's Python backend loads.
# Usage: system-packages.sh PYTHON
set -euo pipefail

library=$("$1" -c 'import sys; print("libpython{}.{}".format(*sys.version_info[:2]))')

if ldconfig -p | grep -q "$library.so.1.0"; then
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "system-packages: install $library with this system's package manager (Triton's Python backend loads it)" >&2
    exit 0
fi
as_root=""
if [ "$(id -u)" -ne 0 ]; then
    if ! sudo -n true 2>/dev/null; then
        echo "system-packages: run: sudo apt-get install $library (Triton's Python backend loads it)" >&2
        exit 0
    fi
    as_root="sudo"
fi
$as_root apt-get update -qq
DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq "$library"
