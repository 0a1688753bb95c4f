#!/usr/bin/env bash
# Verifies and measures everything on a GPU, from a bare checkout, in under 10 minutes:
#
#   bench/gpu_check.sh OUT_DIR
#
# Builds the extensions with CUDA in place, runs the GPU tests, runs the benchmarks, and leaves
# JSON, logs and a table in OUT_DIR. Needs no network, and of packages only a CUDA build of torch
# with its requirements (triton among them), transformers, setuptools, ninja, pybind11 and pytest;
# and nvcc. Every part runs whatever the others did, none longer than what is left of the time; the
# exit status is 0 only if all went well. PYTHON names the interpreter.
set -uo pipefail
out=$(mkdir -p "${1:?usage: bench/gpu_check.sh OUT_DIR}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$($python -c \
  'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')}
deadline=570 # seconds from the start
parts=(build triton_tests info tests learners metasteps updates attention pairwise lstm lora entropy)

part() { # name, seconds at most, command...
  local name=$1 limit=$2 start=$SECONDS left=$((deadline - SECONDS)) status=124
  shift 2
  : >"$out/$name.log"
  if [ "$left" -gt 0 ]; then
    timeout "$((limit < left ? limit : left))" "$@" >"$out/$name.log" 2>&1
    status=$?
  fi
  echo "$status $((SECONDS - start))" >"$out/$name.status"
  tail -n 30 "$out/$name.log"
  echo "== $name: status $status, $((SECONDS - start)) s"
}

# (the options of pyproject.toml name a plugin that need not be here)
run_tests() { # name, seconds at most, pytest's arguments...
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" -m pytest -o addopts= --import-mode=importlib -m "not slow" \
    -p no:cacheprovider -q --durations=10 "$@"
}

# Triton kernels need no extension: their tests run while it is compiled.
run_tests triton_tests 240 tests/test_triton_device.py &
part build 240 env FASTMETA_BUILD_EXT=1 MAX_JOBS="$(nproc)" "$python" setup.py build_ext --inplace
wait
part info 30 "$python" -m fastmeta.info
run_tests tests 180 tests/test_ops.py tests/test_inner_update.py tests/test_inner_update_lists.py \
  tests/test_head_inner_loop.py tests/test_cuda_device.py \
  -k "(cuda and not emulated) or cuda_device"
part learners 150 "$python" tests/gpu -o addopts= --import-mode=importlib -m "not slow" --durations=10
part metasteps 200 "$python" -m bench.compare --device cuda --rounds 2 --out "$out/metasteps.json"
part updates 100 "$python" -m bench.compare_updates --device cuda --out "$out/updates.json"
part attention 120 $python -m bench.compare_attention --device cuda --out "$out/attention.json"
part pairwise 100 "$python" -m bench.compare_pairwise --device cuda --out "$out/pairwise.json"
part lstm 40 "$python" -m bench.compare_coordinate_lstm --device cuda --rounds 5 --out "$out/lstm.json"
part lora 60 "$python" -m bench.compare_lora --device cuda --rounds 5 --out "$out/lora.json"
part entropy 40 "$python" -m bench.compare_cross_entropy --device cuda --rounds 5 \
  --out "$out/entropy.json"

failed=()
{
  "$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)'
  for name in "${parts[@]}"; do
    read -r status seconds <"$out/$name.status"
    [ "$status" -eq 0 ] || failed+=("$name")
    echo && echo "== $name: status $status, $seconds s" && tail -n 60 "$out/$name.log"
  done
  echo && echo "$SECONDS s; failed: ${failed[*]:-nothing}"
} >"$out/summary.txt"
echo "$SECONDS s; failed: ${failed[*]:-nothing}; see $out/summary.txt"
[ ${#failed[@]} -eq 0 ]
