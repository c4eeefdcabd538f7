#!/bin/sh
# Times the authors' package; README.md beside this file says how.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/environment.sh"
"$peer/bin/python" "$here/decode.py" "$@"
