#!/usr/bin/env bash
# Install the locked dependencies and this package into .venv. Instant when nothing has changed.
#
# Uses uv where it works, else pip; both check every hash of requirements.lock.
# PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
stamp=$venv/.installed

# What the installation depends on.
wanted() {
  pwd -P
  cat scripts/setup.sh pyproject.toml requirements.lock
}

fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

fits() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1
}

# The first interpreter that runs: a name on PATH may be a shim of a version that is not installed.
find_python() {
  if [[ -n ${PYTHON:-} ]]; then
    fits "$PYTHON" || fail "PYTHON=$PYTHON does not run, or is not Python 3.11, 3.12 or 3.13"
    printf '%s\n' "$PYTHON"
    return
  fi
  local name
  for name in python3.11 python3.12 python3.13 python3 python; do
    if fits "$name"; then
      command -v "$name"
      return
    fi
  done
  fail "needs Python 3.11, 3.12 or 3.13 on PATH (or PYTHON=/path/to/python); python3 here is:" \
    "$(python3 --version 2>&1 || true)"
}

uv_works() {
  uv --version >/dev/null 2>&1
}

version_of() {
  "$1" -c 'import sys; print(sys.version)'
}

usable() {
  [[ -x $venv/bin/python ]] && fits "$venv/bin/python" || return 1
  # Its scripts name the place where it was made: a moved one only looks whole.
  grep -qF -e "$PWD/$venv" -e "$(pwd -P)/$venv" "$venv/bin/activate" || return 1
  [[ -z ${PYTHON:-} || $(version_of "$venv/bin/python") == "$(version_of "$PYTHON")" ]]
}

create() {
  local python
  python=$(find_python)
  echo "setup: making $venv with $("$python" --version) ($python)"
  rm -rf "$venv"
  "$python" -m venv "$venv" >/dev/null 2>&1 && return
  rm -rf "$venv"
  uv_works && uv venv --quiet --python "$python" "$venv" && return
  fail "$python cannot make virtual environments; on Debian and Ubuntu install python3-venv"
}

# --no-build-isolation: the build backend comes from the lock too, not from whatever is newest today.
install_with_uv() {
  # The system's certificates, as pip does: behind a company's proxy nothing else works.
  local uv=(env "UV_SYSTEM_CERTS=${UV_SYSTEM_CERTS:-true}" uv pip install --quiet --python "$venv/bin/python")
  "${uv[@]}" --require-hashes -r requirements.lock &&
    "${uv[@]}" --no-deps --no-build-isolation --editable .
}

install_with_pip() {
  local python=$venv/bin/python
  "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null ||
    fail "$venv has no pip; remove $venv and try again"
  local pip=("$python" -m pip --disable-pip-version-check install --quiet)
  "${pip[@]}" --require-hashes -r requirements.lock &&
    "${pip[@]}" --no-deps --no-build-isolation --editable .
}

install() {
  if uv_works; then
    install_with_uv && return
    echo "setup: uv could not install this, see above; trying pip" >&2
  fi
  install_with_pip || fail "the installation did not succeed, see above"
}

usable || create
if [[ -f $stamp ]] && cmp -s "$stamp" <(wanted); then
  exit 0
fi
rm -f "$stamp"
echo "setup: installing the locked dependencies (downloads several hundred MB the first time)"
install
wanted >"$stamp.new"
mv "$stamp.new" "$stamp"
