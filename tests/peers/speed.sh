#!/usr/bin/env bash
# mudit beside PyTorch and ONNX Runtime on the same work: writes tests/results/speed.md and .json. Arguments go to speed.py
# (row names, --rounds N). PYTHON names an environment that has torch, diffusers and onnxruntime; without it one is made
# below target/ (about 3 GB). Needs a C++ compiler for torch.compile.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ -z "${PYTHON:-}" ]; then
  PYTHON=$PWD/target/speed-venv/bin/python
  [ -x "$PYTHON" ] || python3 -m venv target/speed-venv
  "$PYTHON" -m pip install -q --disable-pip-version-check torch==2.15.0 diffusers==0.42.1 onnx==1.23.2 onnxscript==0.7.2 \
    onnxruntime==1.31.1 numpy==2.4.6
fi
cargo build --locked --release -q -p mudit-tests --bin mudit-speed-worker
worker=${CARGO_TARGET_DIR:-target}/release/mudit-speed-worker
"$PYTHON" -B tests/peers/speed.py --python "$PYTHON" --worker "$(realpath "$worker")" --prepare
exec "$PYTHON" -B tests/peers/speed.py --python "$PYTHON" --worker "$(realpath "$worker")" "$@"
