#!/usr/bin/env bash
# Everything a GPU can tell, in one go: benchmarks/gpu.sh OUT [--only SECTIONS] [--minutes N] [--dry]
# Nothing is installed: the tree is on PYTHONPATH. PYTHON names another interpreter than .venv's or python3.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=${PYTHON:-}
if [ -z "$python" ]; then
    if [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; else python=python3; fi
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m benchmarks.gpu "$@"
