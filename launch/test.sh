#!/usr/bin/env bash
# Runs the tests, after installing what they need; arguments go to pytest, such as `launch/test.sh -k reporting`.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh test,parity
exec python -m pytest -n 2 --dist loadfile "${@:-tests}"
