#!/bin/sh
# Make the environment of the submission base image: the submission host, and what an agent may count on.
# Usage: install_submission.sh DIRECTORY SOURCE; TORCH="torch==..." adds that, from pip's own configuration.
set -eu

directory=$1
source=$2
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore

# pip stays in it: it installs the wheels that a submission brings along, offline.
python3 -m venv "$directory"
"$directory/bin/python" -m pip install --quiet --require-hashes --no-deps -r "$source/images/submission.lock"
if [ -n "${TORCH:-}" ]; then
  "$directory/bin/python" -m pip install --quiet --constraint "$source/images/submission.lock" "$TORCH"
fi

# Of our code what runs beside a submission, and nothing of the rest: it imports none of it.
packages=$("$directory/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$packages/orchestrator/submission"
cp "$source/orchestrator/__init__.py" "$packages/orchestrator/"
cp "$source"/orchestrator/submission/*.py "$packages/orchestrator/submission/"
"$directory/bin/python" -m compileall -q "$packages/orchestrator"
