#!/usr/bin/env bash
# All that a first hour with a GPU is for, in under ten minutes: proof, calibration, benchmarks. Nothing stops it; what
# failed or ran out of time is said at the end.
#
#   bash kernels/benchmarks/first_gpu_run.sh [FOLDER]            results go into FOLDER, by default gpu-results
#   bash kernels/benchmarks/first_gpu_run.sh --dry-run [FOLDER]  the same commands on the CPU, small, in some minutes
#
# FOLDER holds a log of each part, kernels.json (the calibration), the benchmarks' CSVs, and measured.csv, which is the
# package's with the rows of this GPU: review, then commit what is to stay.
set -uo pipefail
dry=0
[ "${1:-}" = --dry-run ] && { dry=1; shift; }
mkdir -p "${1:-gpu-results}"
out=$(cd "${1:-gpu-results}" && pwd)
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD:$PWD/kernels XDG_CACHE_HOME=$out ANIMATEDIFF_KERNELS=
cp kernels/animatediff_kernels/measured.csv "$out/measured.csv"
step=kernels/benchmarks/step.py run=kernels/benchmarks/run.py

summary=()
part() { # name, most seconds, command…
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  echo "== $name: $*"
  timeout "$limit" "$@" 2>&1 | tee "$out/$name.log"
  summary+=("$name: exit ${PIPESTATUS[0]}, $((SECONDS - begin)) s of at most $limit")
}

if [ $dry = 1 ]; then
  part tests 300 python -m pytest -q -n 0 -m gpu tests/kernels/test_gpu.py
  part step 900 python $step --device cpu --threads 1 --size 64 --frames 2 --repeat 1 --networks ours --results "$out"
  part calibration 120 python scripts/doctor.py --gpu
  part operations 600 python $run --device cpu --threads 1 --clip 16f-256 --op geglu --layer down_blocks.0 --mode fwd \
    --no-compile --measured --results "$out"
else
  part machine 10 nvidia-smi
  part tests 200 python -m pytest -q -n 0 -m gpu tests/kernels/test_gpu.py -k "16f-512 or small or more_pixels or replayed"
  part step 120 python $step --device cuda --size 512 --repeat 2 --networks ours ours-torch ours-triton --results "$out"
  part calibration 30 python scripts/doctor.py --gpu
  part operations 150 python $run --device cuda --dtype bfloat16 --clip 16f-512 --no-compile --measured --results "$out"
  part compiled 80 python $step --device cuda --size 512 --repeat 1 --networks ours ours-compiled --results "$out/compiled"
fi
[ -f "$out/animatediff/kernels.json" ] && cp "$out/animatediff/kernels.json" "$out/kernels.json"
printf '%s\n' "" "${summary[@]}" | tee "$out/summary.txt"
