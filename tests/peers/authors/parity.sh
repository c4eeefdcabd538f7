#!/bin/sh
# Compares our published names with the authors' code: README.md beside this file says what.
# PYTHON: ours. PEER_SOURCE: the authors' repository, an address or a clone. --record writes recorded.json anew.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
. "$here/environment.sh"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
git clone --quiet --no-checkout "${PEER_SOURCE:-https://github.com/ngocbh/trimkv}" "$out/repository"
git -C "$out/repository" checkout --quiet 0456bc4eb5bc20972c7463cabf3ae859e498f7f6 -- src
TRITON_INTERPRET=1 PYTHONPATH="$root/tests" "$peer/bin/python" "$here/loss_values.py" 200 >"$out/losses.json"
PYTHONPATH="$root/tests" "$peer/bin/python" "$here/generations.py" 0.1.5 "$out/0.1.5.json"
PYTHONPATH="$out/repository/src:$root/tests" "$peer/bin/python" "$here/generations.py" 0456bc4 "$out/0456bc4.json"
[ "${1:-}" = --record ] && set -- --record "$here/recorded.json"
PYTHONPATH="$root/src:$root/tests" "$python" "$here/compare.py" "$out" "$@"
