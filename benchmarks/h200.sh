#!/usr/bin/env bash
# Everything that needs a Hopper GPU, part by part, on a bare machine without a network.
#
#   benchmarks/h200.sh PART...      PART: unpack, smoke, tests, g1, g2, curve, g3, fit, g4, all
#
# Each but `all` ends within ten minutes (g2: each of its SHAPES). curve trains a 1B shape in bfloat16 and in FP8 and
# compares the losses; g3 compares the speed of training with TRL's, fit the tokens that memory holds.
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
# Each is unpacked into $SITE (default: .site) once; where not all can be carried at once, `unpack` takes one load after
# another. Peers of g1 and g3 (liger-kernel, cut-cross-entropy) take part where their wheels are carried too. g3 and fit
# need TRL and what it needs beside transformers, 72 MB in the same way:
#
#     trl==1.16.0 accelerate datasets pyarrow pandas dill multiprocess xxhash python-dateutil pytz tzdata six jinja2 \
#       markupsafe aiohttp aiohappyeyeballs aiosignal attrs frozenlist multidict propcache yarl
#
# g4 needs PEER_PYTHON: a Python that has llm-blender 0.0.2. Figures are written to benchmarks/results/<gpu>/*.json and,
# where OUT names a folder, copied there. SHAPES (default "1b 8b") are those of g2.
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
  mkdir -p "$SITE/.unpacked"
  for bundle in "$BUNDLES"/te-*.tar.xz "$BUNDLES"/*.whl; do
    local done=$SITE/.unpacked/$(basename "$bundle")
    [ -e "$bundle" ] && [ ! -e "$done" ] || continue
    case $bundle in
      *.whl) "$PYTHON" -m zipfile -e "$bundle" "$SITE" ;;
      *) "$PYTHON" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' "$bundle" "$SITE" ;;
    esac
    touch "$done"
  done
  compgen -G "$SITE/.unpacked/te-*" >/dev/null && return
  echo "h200.sh: error: $BUNDLES holds no te-*.tar.xz. Set BUNDLES to the folder that does." >&2
  exit 2
}

run() {
  echo "== $*"
  timeout "$LIMIT" "$@"
}

train() {
  run "$PYTHON" -m benchmarks.train_throughput --setup h100 --peer-python "$PYTHON" --pairs-per-rank 8 "$@"
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
    curve) train --part curve --steps 10 ;;
    g3) train --repeats 2 ;;
    fit) train --part fit ;;
    g4)
      : "${PEER_PYTHON:?set PEER_PYTHON to a Python that has llm-blender 0.0.2}"
      run "$PYTHON" -m benchmarks.pairrm --peer-python "$PEER_PYTHON" --device cuda --shape 0.4b --prompts 64 --responses 5
      ;;
    all) for each in smoke tests g1 g2 curve g3 fit g4; do part "$each"; done ;;
    *)
      echo "h200.sh: error: no part $1. Use unpack, smoke, tests, g1, g2, curve, g3, fit, g4 or all." >&2
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
