# shellcheck shell=bash
# To be sourced: `source launch/environment.sh EXTRA` leaves a virtual environment active in which `dit-jax` runs.
# It uses the active environment if there is one, else .venv in the project's root, which it makes; it installs the
# project with its extra EXTRA ("" for none; tpu, gpu, test) and those in DIT_JAX_EXTRAS (such as "gpu"), if it has not yet.

dit_jax_error() {
  echo "error: $*" >&2
  return 1
}

# Whether a Python is of a version that all we depend on has wheels for (TensorFlow has none for 3.14).
dit_jax_supports() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

# Prints a supported Python that can make virtual environments.
dit_jax_find_python() {
  local candidate venv_missing=""
  for candidate in python3.11 python3.12 python3.13 python3 python; do
    if dit_jax_supports "$candidate"; then
      if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "$candidate"
        return
      fi
      venv_missing=$candidate
    fi
  done
  if [[ -n $venv_missing ]]; then
    dit_jax_error "$venv_missing cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"
  else
    dit_jax_error "no Python 3.11, 3.12 or 3.13 found; install one (on Debian 12: apt-get install python3 python3-venv)"
  fi
}

# Activates the environment; makes .venv where none is active, again if an earlier attempt was cut short.
dit_jax_activate() {
  local root=$1 python
  if [[ -z ${VIRTUAL_ENV:-} ]]; then
    VIRTUAL_ENV=$root/.venv
    if [[ -e $VIRTUAL_ENV/dit_jax_installing ]] || ! "$VIRTUAL_ENV/bin/python" -c 'import pip' 2>/dev/null; then
      python=$(dit_jax_find_python) || return 1
      echo "making the virtual environment $VIRTUAL_ENV with $("$python" --version)"
      "$python" -m venv --clear "$VIRTUAL_ENV" || dit_jax_error "could not make $VIRTUAL_ENV (see above)" || return 1
    fi
  fi
  export VIRTUAL_ENV PATH=$VIRTUAL_ENV/bin:$PATH
  unset PYTHONHOME
  hash -r
  dit_jax_supports "$VIRTUAL_ENV/bin/python" ||
    dit_jax_error "the active environment $VIRTUAL_ENV must have Python 3.11, 3.12 or 3.13;" \
      "deactivate it, and a fitting one will be made" ||
    return 1
  "$VIRTUAL_ENV/bin/python" -c 'import pip' 2>/dev/null || "$VIRTUAL_ENV/bin/python" -m ensurepip >/dev/null ||
    dit_jax_error "the active environment $VIRTUAL_ENV has no pip; deactivate it, and a fitting one will be made"
}

# Installs the project, unless the environment's stamp says that this state of it is there already. The stamp's first
# line is the checksum of what decides the installation; each further line is an extra that was installed.
dit_jax_install() {
  local root=$1 extra=$2 stamp=$VIRTUAL_ENV/dit_jax_installed checksum
  checksum=$(echo "$root" | cat - "$root/setup.py" "$root/launch/constraints.txt" | cksum)
  if [[ -x $VIRTUAL_ENV/bin/dit-jax && $(head -n 1 "$stamp" 2>/dev/null) == "$checksum" ]]; then
    if [[ -z $extra ]] || grep -qxF -- "$extra" "$stamp"; then
      return
    fi
  else
    rm -f "$stamp"
  fi
  echo "installing dit_jax${extra:+ [$extra]} into $VIRTUAL_ENV (a minute or two)"
  touch "$VIRTUAL_ENV/dit_jax_installing"
  # Compiling every module of every package takes longer than compiling, at first import, those that are used.
  "$VIRTUAL_ENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-compile --use-pep517 \
    --constraint "$root/launch/constraints.txt" --editable "$root${extra:+[$extra]}" ||
    dit_jax_error "pip could not install the project (see above); once that is mended, start this script again" ||
    return 1
  # Where Python must not write what it compiled (containers often ask for that), every start would compile it all again:
  # that makes importing JAX take four times as long.
  if [[ -n ${PYTHONDONTWRITEBYTECODE:-} ]]; then
    "$VIRTUAL_ENV/bin/python" -m compileall -q -j 0 "$VIRTUAL_ENV/lib" "$root/dit_jax" >/dev/null ||
      true # some packages carry files for other versions of Python
  fi
  [[ -e $stamp ]] || echo "$checksum" >"$stamp"
  echo "$extra" >>"$stamp"
  rm -f "$VIRTUAL_ENV/dit_jax_installing"
}

dit_jax_environment() {
  local root extra=$1
  root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd) || return 1
  if [[ -n ${DIT_JAX_EXTRAS:-} ]]; then
    extra=$DIT_JAX_EXTRAS${extra:+,$extra}
  fi
  [[ $extra =~ ^[a-z0-9,]*$ ]] || dit_jax_error "DIT_JAX_EXTRAS must be names of extras, such as gpu or tpu,gcs" || return 1
  dit_jax_activate "$root" && dit_jax_install "$root" "$extra"
}

dit_jax_environment "${1:-}"
