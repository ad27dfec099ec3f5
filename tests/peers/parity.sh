#!/usr/bin/env bash
# Builds engines from the fixtures and runs their files with other software, which knows no op of ours: outputs, losses and
# every gradient against PyTorch's. Python's ONNX Runtime of five versions, the oldest and the newest that the README names
# among them; the newest after onnxslim has rewritten the files; OpenVINO with programs without functions. Needs python3 with
# venv; installs packages below target/. `parity.sh VERSION…` takes these versions of ONNX Runtime alone.
set -euo pipefail
cd "$(dirname "$0")/../.."
export ORT_DISABLE_TELEMETRY=1
pinned=1.31.1
versions=("$@")
[ $# -gt 0 ] || versions=($pinned 1.20.1 1.22.1 1.25.1 1.27.0 1.32.0)

# The interpreter of an environment with these packages.
python_with() {
  local name=$1
  shift
  local venv=target/parity-venv/$name
  [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
  "$venv/bin/python" -m pip install -q --disable-pip-version-check numpy==2.4.6 safetensors==0.8.0 "$@" >&2
  echo "$venv/bin/python"
}

cargo build --locked -q -p mudit
mudit=${CARGO_TARGET_DIR:-target}/debug/mudit
build() {
  local fixture=$1 channels=$2 engine=$3
  shift 3
  rm -f "$engine"/*.answers.npz
  "$mudit" build-engine --model "$fixture/config.json" --weights "$fixture/weights.safetensors" --provider none \
    --program denoise,denoise-cfg,step-rows,train-step --buckets 2,4 --cfg-channels "$channels" --out "$engine" "$@" >/dev/null
}
check() { # reader, its interpreter, ending of the engines' names
  for fixture in tests/fixtures/dit-*/; do
    for channels in 3 4; do
      "$2" -B tests/peers/parity.py "target/parity/$(basename "$fixture")-$channels$3" "$fixture" --reader "$1" \
        --guided-channels $channels
    done
  done
}
for fixture in tests/fixtures/dit-*/; do
  for channels in 3 4; do
    engine=target/parity/$(basename "$fixture")-$channels
    build "$fixture" $channels "$engine"
    build "$fixture" $channels "$engine-inlined" --inline
  done
done
for version in "${versions[@]}"; do
  python=$(python_with "onnxruntime-$version" "onnxruntime==$version")
  check onnxruntime "$python" ""
  check onnxruntime "$python" -inlined
done
if [ $# = 0 ]; then
  check onnxslim "$(python_with onnxslim onnxruntime==$pinned onnxslim==0.1.98 onnx==1.23.2)" ""
  check openvino "$(python_with openvino openvino==2026.4.1)" -inlined
fi
