#!/bin/sh
# Make the environment of the control plane's image: locked packages, and this package as a wheel.
# Usage: install_control.sh DIRECTORY SOURCE
set -eu

directory=$1
source=$2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore

# --no-deps: the lock is whole but for what must stay out (docs/operate.md), which pip would add again.
python3 -m venv "$directory"
"$directory/bin/python" -m pip install --quiet --require-hashes --no-deps -r "$source/images/control.lock"

python3 -m venv "$scratch/builder"
"$scratch/builder/bin/python" -m pip install --quiet --require-hashes -r "$source/images/build.lock"
"$scratch/builder/bin/python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$scratch" "$source"
"$directory/bin/python" -m pip install --quiet --no-deps --no-index "$scratch"/orchestrator-*.whl
