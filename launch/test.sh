#!/usr/bin/env bash
# Runs the tests, after installing what they need; arguments go to pytest, such as `launch/test.sh -k reporting`.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh test,parity

# What our LPIPS and figures of samples are compared with: the published weights, and the packages that they are of. These
# ask for torchvision, which has no build for CPUs alone and for which the tests stand in: hence no dependencies.
# torch-fidelity goes to a folder of its own, since it has a package `tests`, too.
install() { python -m pip install --quiet --disable-pip-version-check --no-input --no-deps "$@"; }
fidelity=$VIRTUAL_ENV/torch_fidelity
if ! { ./launch/lpips_weights.sh && install lpips==0.1.4 &&
  { [[ -e $fidelity/torch_fidelity ]] || install --target "$fidelity" torch-fidelity==0.4.0; }; }; then
  if [[ -n ${DIT_JAX_REQUIRE_ALL_TESTS:-} ]]; then exit 1; fi
  echo "warning: without these weights or these packages, the tests that compare with them are skipped" >&2
fi
exec python -m pytest -n 2 --dist worksteal "${@:-tests}"
