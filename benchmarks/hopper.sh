#!/usr/bin/env bash
# The door to benchmarks/hopper.py, which says what there is: benchmarks/hopper.sh --help
#
# PYTHON is the interpreter (default: python3). On a machine without a network, wheels and Transformer Engine are carried
# in $BUNDLES (default: bundles/ in the repository), as *.whl made where there is a network by
#
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --dest bundles \
#     megatron-core==0.19.2 msgspec tyro docstring-parser typeguard nvidia-ml-py psutil pytest pytest-timeout pytest-xdist execnet iniconfig pluggy pygments
#
# and *.tar.xz: Transformer Engine with its torch extension, built beside the machine's torch, and for loop vLLM. Each is
# unpacked into $SITE (default: .site) once, which goes before what is installed. `hopper.sh unpack` does that and no
# more, so that one load can be carried after another. g3 and fit need TRL besides, 72 MB in the same way:
#
#   trl==1.16.0 accelerate datasets pyarrow pandas dill multiprocess xxhash python-dateutil pytz tzdata six jinja2 \
#     markupsafe aiohttp aiohappyeyeballs aiosignal attrs frozenlist multidict propcache yarl
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

BUNDLES=${BUNDLES:-$PWD/bundles}
SITE=${SITE:-$PWD/.site}
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$SITE:$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export CUDA_DEVICE_MAX_CONNECTIONS=1 # sequence parallelism overlaps as Megatron-Core wants it

for bundle in "$BUNDLES"/*.tar.xz "$BUNDLES"/*.whl; do
  stamp=$SITE/.unpacked/$(basename "$bundle")
  if [ ! -e "$bundle" ] || [ -e "$stamp" ]; then continue; fi
  mkdir -p "$SITE/.unpacked"
  case $bundle in
    *.whl) "$PYTHON" -m zipfile -e "$bundle" "$SITE" ;;
    *) "$PYTHON" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' "$bundle" "$SITE" ;;
  esac
  touch "$stamp"
done
if [ "${1:-}" = unpack ]; then exit; fi
exec "$PYTHON" -m benchmarks.hopper "$@"
