#!/usr/bin/env bash
# The whole proof on a machine with an NVIDIA GPU (driver 580 or newer), in one command: libraries, doctor, kernels, ops,
# programs, training, sampling, and the speed beside PyTorch. Writes tests/results/gpu-speed.md.
#
#   tests/gpu/run.sh [--no-peers] [ROW …]      rows of speed.py; --no-peers leaves PyTorch (3 GB) out
#
# Libraries come from PyPI into target/gpu-venv (about 2.5 GB). On a machine that cannot fetch, name folders that have them in
# MUDIT_CUDA_LIBRARIES and the library in ORT_DYLIB_PATH; tests/gpu/thin.py makes them small enough to carry there.
set -euo pipefail
cd "$(dirname "$0")/../.."
peers=yes
if [ "${1:-}" = --no-peers ]; then peers=no; shift; fi

if [ -z "${MUDIT_CUDA_LIBRARIES:-}" ]; then
  venv=$PWD/target/gpu-venv
  [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
  # mudit finds libraries in the packages of the first python3.
  export PATH=$venv/bin:$PATH
  python3 -m pip install -q --disable-pip-version-check onnxruntime-gpu==1.31.1 nvidia-cuda-runtime==13.0.96 \
    nvidia-cuda-nvrtc==13.0.88 nvidia-cublas==13.1.0.3 nvidia-curand==10.4.0.35 nvidia-cufft==12.0.0.61 \
    nvidia-cudnn-cu13==9.13.0.50
  if [ $peers = yes ]; then
    python3 -m venv target/gpu-peers
    target/gpu-peers/bin/python -m pip install -q --disable-pip-version-check torch==2.15.0 diffusers==0.42.1 numpy==2.4.6
  fi
fi
[ $peers = no ] || peer=${PYTHON:-$PWD/target/gpu-peers/bin/python}

cargo build --locked --release -q -p mudit -p mudit-tests --features mudit-tests/peers
bin=${CARGO_TARGET_DIR:-target}/release
"$bin/mudit" doctor
MUDIT_NEEDS_GPU=1 MUDIT_NEEDS_NVRTC=1 cargo test --locked --release -p runtime --lib cuda::kernels
MUDIT_NEEDS_GPU=1 cargo test --locked --release -p mudit-tests --test gpu -- --test-threads=1 --nocapture
providers=cuda
if "$bin/mudit" doctor | grep -q 'provider tensorrt *ok'; then providers=cuda,tensorrt; fi
python3 -B tests/gpu/speed.py --worker "$(realpath "$bin/mudit-speed-worker")" --providers $providers \
  --python "${peer:-/nonexistent}" "$@"
