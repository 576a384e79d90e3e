#!/usr/bin/env bash
# Everything that needs a Hopper GPU, part by part, on a bare machine without a network.
#
#   benchmarks/h200.sh PART...      PART: unpack, smoke, tests, g1, g2, g4, all; each but `all` ends within ten minutes
#
# The machine has Python 3.12, torch 2.11 for CUDA 13 and transformers 5; all else is carried in $BUNDLES (default:
# bundles/ in the repository):
#
#   te-2.11.0-sm90-torch2.11.0-cp312.tar.xz     Transformer Engine and what it needs, for sm_90 alone
#   te_smoke.py                                 its smoke test
#   *.whl                                       pure wheels and the megatron-core wheel, made where there is a network by
#     pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#       --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --dest bundles \
#       megatron-core==0.19.2 tyro docstring-parser typeguard nvidia-ml-py psutil pytest pytest-timeout iniconfig pluggy pygments
#
# They are unpacked into $SITE (default: .site) once. Peers of g1 (liger-kernel, cut-cross-entropy) take part where their
# wheels are carried too. g4 also needs PEER_PYTHON: a Python that has llm-blender 0.0.2. Figures are written to
# benchmarks/results/<gpu>/*.json and, where OUT names a folder, copied there. SHAPES (default "1b 8b") are those of g2.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

BUNDLES=${BUNDLES:-$PWD/bundles}
SITE=${SITE:-$PWD/.site}
PYTHON=${PYTHON:-python3}
SHAPES=${SHAPES:-1b 8b}
LIMIT=${LIMIT:-570} # seconds of one part
export PYTHONPATH="$SITE:$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export CUDA_DEVICE_MAX_CONNECTIONS=1 # sequence parallelism overlaps as Megatron-Core wants it

usage() {
  sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

unpack() {
  [ -e "$SITE/.unpacked" ] && return
  local archive=$BUNDLES/te-2.11.0-sm90-torch2.11.0-cp312.tar.xz
  [ -f "$archive" ] || { echo "h200.sh: error: $archive does not exist. Set BUNDLES to the folder that has it." >&2; exit 2; }
  mkdir -p "$SITE"
  "$PYTHON" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' "$archive" "$SITE"
  for wheel in "$BUNDLES"/*.whl; do
    [ -e "$wheel" ] && "$PYTHON" -m zipfile -e "$wheel" "$SITE"
  done
  touch "$SITE/.unpacked"
}

run() {
  echo "== $*"
  timeout "$LIMIT" "$@"
}

part() {
  case $1 in
    unpack) ;;
    smoke)
      nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv
      run "$PYTHON" "$BUNDLES/te_smoke.py"
      ;;
    tests) run "$PYTHON" -m pytest tests/gpu tests/unit/model/test_transformer_engine_spec.py -q -p no:cacheprovider ;;
    g1) run "$PYTHON" -m benchmarks.head_gpu ;;
    g2) for shape in $SHAPES; do run "$PYTHON" -m benchmarks.train_gpu --shape "$shape"; done ;;
    g4)
      : "${PEER_PYTHON:?set PEER_PYTHON to a Python that has llm-blender 0.0.2}"
      run "$PYTHON" -m benchmarks.pairrm --peer-python "$PEER_PYTHON" --device cuda --shape 0.4b --prompts 64 --responses 5
      ;;
    all) for each in smoke tests g1 g2 g4; do part "$each"; done ;;
    *)
      echo "h200.sh: error: no part $1. Use unpack, smoke, tests, g1, g2, g4 or all." >&2
      exit 2
      ;;
  esac
}

if [ $# -eq 0 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
  usage
  exit 0
fi
unpack
for each in "$@"; do part "$each"; done
if [ -n "${OUT:-}" ]; then
  mkdir -p "$OUT"
  cp -r benchmarks/results "$OUT/"
fi
