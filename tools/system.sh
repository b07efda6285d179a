#!/bin/sh
# What pip cannot install: a Python of the right version with venv, clang (needed), PoCL (wished for).
# As root with apt they are installed; else the one command to type is printed. Usage: tools/system.sh PYTHON
set -eu
python=$1

stop() {
    echo "setup: $*" >&2
    exit 1
}

# can_install: apt is here, and we may use it
can_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; }

install() {
    echo "setup: installing $*"
    [ -n "${updated:-}" ] || apt-get -qq update || echo "setup: apt-get update failed, going on" >&2
    updated=yes
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@" >/dev/null
}

command -v "$python" >/dev/null 2>&1 || stop "no $python; install Python 3.11, 3.12 or 3.13, or name one: make setup PYTHON=..."
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
    3.11 | 3.12 | 3.13) ;;
    *) stop "$python is Python $version, but 3.11, 3.12 or 3.13 is needed; name one: make setup PYTHON=python3.13" ;;
esac

# Debian keeps venv's pip apart from Python
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    if can_install; then install "python$version-venv" || install python3-venv || true; fi
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        stop "$python has no venv; type: sudo apt-get install python$version-venv"
fi

# tinygrad's CPU device compiles with clang (CC names another one)
compiler=${CC:-clang}
if ! command -v "$compiler" >/dev/null 2>&1; then
    if can_install; then install clang || true; fi
    command -v "$compiler" >/dev/null 2>&1 || stop "no $compiler; type: sudo apt-get install clang"
fi

# an OpenCL device on the CPU, for the tests of DEV=CL: without it they are skipped
if ! ls /etc/OpenCL/vendors/*.icd >/dev/null 2>&1; then
    pocl="pocl-opencl-icd ocl-icd-libopencl1"
    # shellcheck disable=SC2086
    if can_install; then install $pocl || true; fi
    ls /etc/OpenCL/vendors/*.icd >/dev/null 2>&1 ||
        echo "setup: no OpenCL, the CL tests will be skipped; to run them type: sudo apt-get install $pocl" >&2
fi
