#!/usr/bin/env bash
# Builds engines from the fixtures and runs their files with stock Python ONNX Runtime, which knows no op of ours:
# outputs, losses and every gradient against PyTorch's. Needs python3 with venv; installs three packages below target/.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=target/parity-venv
[ -x $venv/bin/python ] || python3 -m venv $venv
$venv/bin/python -m pip install -q --disable-pip-version-check onnxruntime==1.31.1 numpy==2.4.6 safetensors==0.8.0
cargo build --locked -q -p mudit
for fixture in tests/fixtures/dit-*/; do
  for channels in 3 4; do
    engine=target/parity/$(basename "$fixture")-$channels
    "${CARGO_TARGET_DIR:-target}/debug/mudit" build-engine --model "$fixture/config.json" --weights "$fixture/weights.safetensors" --provider none \
      --program denoise,denoise-cfg,train-step --buckets 2,4 --cfg-channels $channels --out "$engine" >/dev/null
    $venv/bin/python -B tests/peers/parity.py "$engine" "$fixture" --guided-channels $channels
  done
done
