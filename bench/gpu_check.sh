#!/usr/bin/env bash
# Verifies and measures everything on a GPU, from a bare checkout:
#
#   bench/gpu_check.sh OUT_DIR
#
# Builds the extensions with CUDA in place, runs the GPU tests, runs the benchmarks, and leaves
# JSON, logs and a table in OUT_DIR. Needs a CUDA build of torch with its requirements (triton among
# them), nvcc, ninja, pybind11, transformers and pytest. Every part runs whatever the others did; the
# exit status is 0 only if all went well. PYTHON names the interpreter.
set -uo pipefail
out=$(mkdir -p "${1:?usage: bench/gpu_check.sh OUT_DIR}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$($python -c \
  'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')}
failed=()

part() { # name, seconds at most, command...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  echo "== $name"
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local status=$?
  tail -n 30 "$out/$name.log"
  echo "== $name: status $status, $((SECONDS - start)) s"
  [ $status -eq 0 ] || failed+=("$name")
}

part build 240 env FASTMETA_BUILD_EXT=1 MAX_JOBS="$(nproc)" $python setup.py build_ext --inplace
part info 60 $python -m fastmeta.info
part tests 240 $python -m pytest tests/test_ops.py tests/test_inner_update.py \
  tests/test_inner_update_lists.py tests/test_head_inner_loop.py tests/test_cuda_device.py -q -p no:cacheprovider \
  -k "(cuda and not emulated) or cuda_device" --durations=10
part triton_tests 300 $python -m pytest tests/test_triton_device.py -q -p no:cacheprovider --durations=10
part updates 120 $python -m bench.compare_updates --device cuda --out "$out/updates.json"
part pairwise 180 $python -m bench.compare_pairwise --device cuda --out "$out/pairwise.json"

{
  $python -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)'
  for name in build info tests triton_tests updates pairwise; do
    echo && echo "== $name" && tail -n 60 "$out/$name.log"
  done
  echo && echo "failed: ${failed[*]:-nothing}"
} >"$out/summary.txt"
echo "failed: ${failed[*]:-nothing}; see $out/summary.txt"
[ ${#failed[@]} -eq 0 ]
