#!/usr/bin/env bash
# Verifies and measures everything on a GPU, from a bare checkout, in under 10 minutes:
#
#   bench/gpu_check.sh OUT_DIR [PART...]
#
# Builds the extensions with CUDA in place, runs the GPU tests, runs the benchmarks, and leaves
# JSON, logs and a table in OUT_DIR; of the named parts alone where some are named. Needs no
# network, and of packages only a CUDA build of torch with its requirements (triton among them),
# transformers, setuptools, ninja, pybind11 and pytest; and nvcc. Tests run side by side, and end
# in time for the benchmarks, which run one by one. Every part runs whatever the others did; the
# exit status is 0 only if all went well. PYTHON names the interpreter.
set -uo pipefail
out=$(mkdir -p "${1:?usage: bench/gpu_check.sh OUT_DIR [PART...]}" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$($python -c \
  'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')}
# torch takes the folder above nvcc for CUDA's, which may hold nothing but a wrapper of it
[ -d /usr/local/cuda ] && export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
tests_end=330 deadline=570 # seconds from the start
kernels=(attention distances lstm lora others)
learners=(test_learners test_others test_replays)
benchmarks=(metasteps attention lora updates pairwise entropy lstm)
parts=(build info tests table_values table_other)
parts+=("${kernels[@]/#/kernels_}" "${learners[@]/#/learners_}" "${benchmarks[@]/#/bench_}")
[ $# -gt 0 ] && parts=("$@")

part() { # name, seconds at most, second from the start that ends it, command...
  local name=$1 limit=$2 left=$(($3 - SECONDS)) start=$SECONDS status=124
  shift 3
  [[ " ${parts[*]} " == *" $name "* ]] || return 0
  : >"$out/$name.log"
  rm -f "$out/$name.status"
  if [ "$left" -gt 0 ]; then
    timeout -s INT -k 15 "$((limit < left ? limit : left))" "$@" >"$out/$name.log" 2>&1
    status=$?
  fi
  echo "$status $((SECONDS - start))" >"$out/$name.status"
  tail -n 30 "$out/$name.log"
  echo "== $name: status $status, $((SECONDS - start)) s"
}

# (the options of pyproject.toml name a plugin that need not be here)
options=(-o addopts= --import-mode=importlib -m "not slow" -p no:cacheprovider -v --tb=short
  --durations=10)
export OMP_NUM_THREADS=2 # many processes share the cores
run_tests() { # name, pytest's arguments...
  local name=$1
  shift
  part "$name" "$tests_end" "$tests_end" "$python" -m pytest "${options[@]}" "$@"
}
benchmark() { # name, seconds at most, arguments...
  local name=$1 limit=$2 module=$3
  shift 3
  part "bench_$name" "$limit" "$deadline" \
    "$python" -m "bench.$module" --device cuda --out "$out/$name.json" "$@"
}

# Triton kernels need no extension: their tests run while it is compiled.
others=
for name in attention distances lstm lora; do
  run_tests "kernels_$name" tests/test_triton_device.py -k "$name" &
  others+="${others:+ and }not $name"
done
run_tests kernels_others tests/test_triton_device.py -k "$others" &
part build 240 "$tests_end" env FASTMETA_BUILD_EXT=1 MAX_JOBS="$(nproc)" \
  "$python" setup.py build_ext --inplace
part info 60 "$tests_end" "$python" -c '
import sys
from fastmeta import _library, info
print(info.report())
sys.exit(any(part.state != "loaded" for part in _library.parts()))'
for rows in values other; do
  not=$([ $rows = other ] && echo not)
  run_tests "table_$rows" tests/test_ops.py -k "cuda and not emulated and $not values" &
done
run_tests tests tests/test_inner_update.py tests/test_inner_update_lists.py \
  tests/test_head_inner_loop.py tests/test_cuda_device.py \
  -k "(cuda and not emulated) or cuda_device" &
for name in "${learners[@]}"; do
  part "learners_$name" "$tests_end" "$tests_end" "$python" tests/gpu "${options[@]}" -k "$name" &
done
wait
unset OMP_NUM_THREADS
benchmark metasteps 110 compare --rounds 2
benchmark attention 40 compare_attention
benchmark lora 25 compare_lora --rounds 5
benchmark updates 30 compare_updates
benchmark pairwise 25 compare_pairwise
benchmark entropy 20 compare_cross_entropy --rounds 5
benchmark lstm 15 compare_coordinate_lstm --rounds 5

failed=()
{
  "$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)'
  for name in "${parts[@]}"; do
    status=none seconds=0
    [ -f "$out/$name.status" ] && read -r status seconds <"$out/$name.status"
    [ "$status" = 0 ] || failed+=("$name")
    echo && echo "== $name: status $status, $seconds s" && tail -n 60 "$out/$name.log"
  done
  echo && echo "$SECONDS s; failed: ${failed[*]:-nothing}"
} >"$out/summary.txt"
echo "$SECONDS s; failed: ${failed[*]:-nothing}; see $out/summary.txt"
[ ${#failed[@]} -eq 0 ]
