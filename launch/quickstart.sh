#!/usr/bin/env bash
# Trains an autoencoder and a DiT on Fashion-MNIST, draws and measures samples and writes a page about it all, from
# nothing: it makes a virtual environment and installs the project if needed, and fetches the data set. It takes a
# quarter of an hour on two CPU cores. Started again, it goes on where it stopped.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/quickstart.sh [--workdir=DIR] [--smoke]
  --workdir=DIR  where everything is written (default: runs/quickstart in the project; runs/smoke with --smoke)
  --smoke        a few steps of everything, in a minute or two, to see that it works; the pictures are noise
  On a GPU node or a TPU: DIT_JAX_EXTRAS=gpu (or tpu) launch/quickstart.sh
TEXT
}

smoke=false
workdir=
for argument in "$@"; do
  case $argument in
    --workdir=?*) workdir=${argument#*=} ;;
    --smoke) smoke=true ;;
    -h | --help) usage && exit ;;
    *) echo "error: unknown argument $argument" >&2 && usage >&2 && exit 2 ;;
  esac
done

workdir=${workdir/#\~\//$HOME/} # a shell leaves --workdir=~/run as it is
caller=$PWD
active=${VIRTUAL_ENV:-}
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
if [[ -z $workdir ]]; then
  workdir=runs/quickstart
  if $smoke; then workdir=runs/smoke; fi
elif [[ $workdir != /* && $caller != "$PWD" ]]; then
  workdir=$caller/$workdir
fi

autoencoder_config=(--config=configs/fashion_mnist_autoencoder.py)
dit_config=(--config=configs/fashion_mnist_dit.py)
num_samples=100
num_evaluated=5000
if $smoke; then
  few_steps=(
    "--config.data.train_split=train[:512]" "--config.data.eval_split=test[:64]"
    --config.optimizer.warmup_steps=1 --config.training.num_train_steps=4 --config.training.log_every_steps=1
    --config.training.eval_every_steps=2 --config.training.checkpoint_every_steps=2
    --config.training.num_eval_examples=64 --config.training.global_batch_size=16
  )
  autoencoder_config+=("${few_steps[@]}")
  dit_config+=("${few_steps[@]}" --config.sampling.num_steps=4 --config.sampling.batch_size=16)
  num_samples=16
  num_evaluated=32
fi

# Prints the command that activates the environment for who called this, from where that was.
activation() {
  local file=$VIRTUAL_ENV/bin/activate
  printf 'source %q\n' "${file#"$caller/"}"
}

# step NAME COMMAND...: says when the command starts; if it fails, the script ends with its exit code.
step() {
  printf '\n[%2d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$1"
  "${@:2}" || {
    local code=$?
    echo "error: this step failed: $1" >&2
    exit "$code"
  }
}

# shellcheck source=launch/environment.sh
step "environment" source launch/environment.sh ""
step "data" ./launch/fashion_mnist.sh
step "train the autoencoder" dit-jax train "${autoencoder_config[@]}" --workdir="$workdir/autoencoder"
step "encode the images" dit-jax encode "${autoencoder_config[@]}" \
  --autoencoder="$workdir/autoencoder" --output="$workdir/latents"
step "train the DiT" dit-jax train "${dit_config[@]}" --workdir="$workdir/dit" \
  --config.latents.path="$workdir/latents"
step "draw samples" dit-jax sample --workdir="$workdir/dit" --output="$workdir/samples" --num_samples="$num_samples" \
  --overwrite # what is here is all of this script
step "measure samples" dit-jax evaluate --workdir="$workdir/dit" --features=classifier --metrics=fd,recognised \
  --num_samples="$num_evaluated" --sampler=dpm_solver --steps=20 --cfg_scale=1.5 --batch_size=100 --overwrite
step "report" dit-jax report --workdir="$workdir/autoencoder" --workdir="$workdir/dit" \
  --samples="$workdir/samples" --output="$workdir/report.html"

printf '\n[%2d:%02d] done\n' $((SECONDS / 60)) $((SECONDS % 60))
echo "samples:  $workdir/samples/grid.png"
echo "measured: $workdir/dit/evaluation/evaluation.json"
echo "report:   $workdir/report.html"
if [[ -z $active ]]; then # the environment is the project's own, and ends with this script
  echo "next:     $(activation)   # then \`dit-jax\` is a command"
fi
