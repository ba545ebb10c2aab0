# Environment of a run on accelerators; the other scripts here source it, docs/tpu.md explains it.
# What is set already stays as it is.

# Compiled and traced programs. Only process 0 of a run writes compiled ones, so all hosts must see the folder.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/r3jax/compiled}"

# Lets collectives run beside computation. Source of names and meanings: "TPU XLA flags" in the
# page "List of XLA compiler flags" of JAX's documentation. libtpu 0.0.42 knows them all.
tpu_flags=(
  --xla_enable_async_all_gather=true
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
  --xla_tpu_overlap_compute_collective_tc=true
)
export LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS-${tpu_flags[*]}}"
unset tpu_flags
