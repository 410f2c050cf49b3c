# shellcheck shell=bash
# To be sourced: `source launch/xla_flags.sh PLATFORM` (tpu or gpu) sets the compiler's flags for training on several chips.
# What is in LIBTPU_INIT_ARGS or XLA_FLAGS already comes last and so wins. Each flag is in the libtpu or the jaxlib that
# launch/constraints.txt names; both stop at a flag that they do not know.

case $1 in
  tpu)
    LIBTPU_INIT_ARGS="$(
      # Gradients are summed while the backward pass goes on, in buckets of differing sizes: what data parallelism waits for.
      echo --xla_tpu_enable_data_parallel_all_reduce_opt=true
      echo --xla_tpu_data_parallel_opt_different_sized_ops=true
      # With fsdp the next block's parameters are gathered during the matmuls of this one, over several of them if need be.
      echo --xla_enable_async_all_gather=true
      echo --xla_tpu_enable_async_collective_fusion=true
      echo --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
      echo --xla_tpu_enable_async_collective_fusion_multiple_steps=true
      # Lets the tensor core compute while it drives these collectives; without it the fusions above gain little.
      echo --xla_tpu_overlap_compute_collective_tc=true
      echo "${LIBTPU_INIT_ARGS:-}"
    )"
    LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS//$'\n'/ }
    export LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS% }
    ;;
  gpu)
    XLA_FLAGS="$(
      # Starts a collective as early and waits for it as late as memory allows, so that matmuls hide it.
      echo --xla_gpu_enable_latency_hiding_scheduler=true
      # One collective for up to 128 MiB of gradients or parameters (default 30 MiB): fewer launches, full links.
      echo --xla_gpu_all_reduce_combine_threshold_bytes=134217728
      echo --xla_gpu_all_gather_combine_threshold_bytes=134217728
      echo --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
      echo "${XLA_FLAGS:-}"
    )"
    XLA_FLAGS=${XLA_FLAGS//$'\n'/ }
    export XLA_FLAGS=${XLA_FLAGS% }
    ;;
  *)
    echo "error: launch/xla_flags.sh knows tpu and gpu, not '$1'" >&2
    return 2
    ;;
esac
