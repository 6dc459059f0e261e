#!/usr/bin/env bash
# Install a node's complete lock into a Python environment:  clusters/install.sh PYTHON cpu|gpu
# pip alone, because it reads the machine's own pip configuration (mirrors, find-links); no dependency resolution.
set -euo pipefail
python=$1
lock=$(dirname "$0")/requirements-$2.txt

pip() { "$python" -m pip --disable-pip-version-check "$@"; }
pin() { grep -E "^$1==" "$lock"; }
say() { echo "setup: $*"; }

# pycosat (of reasoning-gym) and deepspeed exist as source only, and Triton compiles its launchers.
if ! command -v "${CC:-cc}" >/dev/null; then
    say "no C compiler; install one (Debian, Ubuntu: apt install build-essential)" >&2
    exit 1
fi
if ! "$python" -c 'import pathlib, sys, sysconfig; sys.exit(not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").is_file())'; then
    say "Python's headers are missing; install them (Debian, Ubuntu: apt install python3-dev)" >&2
    exit 1
fi

say "installing $(grep -c == "$lock") packages from $lock into $("$python" -c 'import sys; print(sys.prefix)'), a few minutes the first time"
pip install -qq --no-deps "$(pin pip)" "$(pin setuptools)"

# The CPU build of torch carries a local version (+cpu) that PyPI does not hold, but a mirror may.
if [ "$2" = cpu ] && ! pip install -qq --no-deps "$(pin torch)" 2>/dev/null; then
    say "$(pin torch) is not on the configured index; taking it from PyTorch's own"
    pip install -qq --no-deps --index-url https://download.pytorch.org/whl/cpu "$(pin torch)" || {
        say "neither index has $(pin torch) for $("$python" -V); try another: make setup PYTHON=python3.11 (or 3.12, 3.13)" >&2
        exit 1
    }
fi

# Source distributions are built with the lock's own setuptools. deepspeed comes last: its set-up imports torch and others.
grep -v '^deepspeed==' "$lock" | pip install -qq --no-deps --no-build-isolation -r /dev/stdin
DS_BUILD_OPS=0 pip install -qq --no-deps --no-build-isolation "$(pin deepspeed)"
