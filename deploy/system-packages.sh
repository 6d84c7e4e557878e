#!/usr/bin/env bash
# Installs the system packages the project needs, where they are missing: the shared library of the Python that Triton's
# Python backend loads, openssl, qemu-user, and on Debian the venv module. Usage: system-packages.sh PYTHON
set -euo pipefail
PATH="$PATH:/usr/sbin:/sbin" # ldconfig, for users other than root

if ! "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "system-packages: $("$1" --version) is too old, Python 3.11 or newer is needed: make install PYTHON=python3.11" >&2
    exit 2
fi
version=$("$1" -c 'import sys; print("{}.{}".format(*sys.version_info[:2]))')

missing=()
ldconfig -p | grep "libpython$version.so.1.0" >/dev/null || missing+=("libpython$version")
command -v openssl >/dev/null || missing+=("openssl") # makes the certificates that tests use
if [ "$(uname -m)" = x86_64 ]; then
    command -v qemu-x86_64 >/dev/null || missing+=("qemu-user") # tests run kernels of older processors in it
fi
"$1" -c 'import ensurepip, venv' 2>/dev/null || missing+=("python$version-venv")
if [ ${#missing[@]} -eq 0 ]; then
    exit 0
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    as_root=(sudo -n)
fi
if ! command -v apt-get >/dev/null || { [ ${#as_root[@]} -gt 0 ] && ! sudo -n true 2>/dev/null; }; then
    echo "system-packages: install ${missing[*]} as root, with apt-get or this system's package manager" >&2
    exit 0
fi
"${as_root[@]}" apt-get update -qq
DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -qq "${missing[@]}"
