# Sourced by run.sh and parity.sh: sets $peer to an environment with the authors' package, made if need be.
# PEER_ENV: where it is or shall be made. PEER_PIP: more options for its pip install.
peer=${PEER_ENV:-${TMPDIR:-/tmp}/trimkv-peer-authors}
if ! "$peer/bin/python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("trimkv", "triton"))))' 2>/dev/null; then
    python3 -m venv "$peer"
    # shellcheck disable=SC2086
    "$peer/bin/python" -m pip install --quiet --disable-pip-version-check ${PEER_PIP:-} trimkv==0.1.5 torch==2.13.0 triton
fi
