#!/bin/sh
# Name every missing build tool, with the package that brings it, before any work is done.
# Usage: check_tools.sh PYTHON
python=${1:-python3}
missing=0

need() { # what Debian-package Homebrew-package
    missing=1
    printf '  %s\n      Debian/Ubuntu: apt-get install %s\n      Homebrew:      brew install %s\n' "$1" "$2" "$3" >&2
}

if ! command -v "$python" >/dev/null 2>&1; then
    need "$python is missing (Python 3.11 or newer)" "python3 python3-venv" "python@3.12"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    need "$python is $("$python" -V 2>&1); Python 3.11 or newer is needed (another one: make PYTHON=python3.12)" \
        "python3.12 python3.12-venv" "python@3.12"
elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    need "$python has no venv module" "python3-venv" "python@3.12"
fi

if ! { command -v "${CXX:-c++}" || command -v g++ || command -v clang++; } >/dev/null 2>&1; then
    need "a C++ compiler is missing (llama-cpp-python is built from source)" "g++" "gcc"
fi

if ! command -v cmake >/dev/null 2>&1; then
    need "cmake is missing (3.21 or newer)" "cmake" "cmake"
else
    version=$(cmake --version | sed -n '1s/[^0-9]*\([0-9][0-9.]*\).*/\1/p')
    major=${version%%.*}
    rest=${version#*.}
    if [ "$major" -lt 3 ] || { [ "$major" -eq 3 ] && [ "${rest%%.*}" -lt 21 ]; }; then
        need "cmake is $version; 3.21 or newer is needed" "cmake" "cmake"
    fi
fi

if [ "$missing" -ne 0 ]; then
    echo "Install what is listed above, then run make again." >&2
    exit 2
fi
