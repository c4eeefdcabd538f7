#!/bin/sh
# Checks our policies against NVIDIA's kvpress; README.md beside this file says how.
# PEER_ENV: where kvpress's environment is or shall be made. PYTHON: ours. PEER_PIP: more options for its pip install.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
peer=${PEER_ENV:-${TMPDIR:-/tmp}/trimkv-peer-kvpress}
python=${PYTHON:-$root/.venv/bin/python}
if [ ! -x "$peer/bin/python" ] || ! "$peer/bin/python" -c 'import kvpress' 2>/dev/null; then
    python3 -m venv "$peer"
    # shellcheck disable=SC2086
    "$peer/bin/python" -m pip install --quiet --disable-pip-version-check ${PEER_PIP:-} kvpress==0.5.4 torch==2.13.0
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
"$peer/bin/python" "$here/dump.py" "$out"
"$python" "$here/compare.py" "$out"
