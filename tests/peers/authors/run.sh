#!/bin/sh
# Times the authors' package; README.md beside this file says how.
# PEER_ENV: where its environment is or shall be made. PEER_PIP: more options for its pip install.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
peer=${PEER_ENV:-${TMPDIR:-/tmp}/trimkv-peer-authors}
if [ ! -x "$peer/bin/python" ] || ! "$peer/bin/python" -c 'import transformers, triton, einops' 2>/dev/null; then
    python3 -m venv "$peer"
    # shellcheck disable=SC2086
    "$peer/bin/python" -m pip install --quiet --disable-pip-version-check ${PEER_PIP:-} trimkv==0.1.5 torch triton
fi
"$peer/bin/python" "$here/decode.py" "$@"
