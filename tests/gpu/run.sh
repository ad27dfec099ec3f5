#!/usr/bin/env bash
# The whole proof on a machine with an NVIDIA GPU (driver 580 or newer; A100, H100, H200), in one command. Parts that are
# named run alone; one that fails does not stop the others. Writes tests/results/gpu-proof.md and gpu-speed.md; exit code 1
# when a part failed.
#
#   tests/gpu/run.sh [--no-peers] [--try] [PART …]
#
# Parts, in order: doctor kernels device answers-S2 answers-XL2 curves speed; speed:ROW,ROW measures rows alone, for machines
# that give a command little time. --no-peers leaves PyTorch (3 GB) out, and with it answers and curves. --try runs all that
# can be run on a machine without a GPU, on small models on its CPU, and writes below target/.
#
# Libraries come from PyPI into target/gpu-venv (about 2.5 GB). On a machine that cannot fetch, name folders that have them in
# MUDIT_CUDA_LIBRARIES, ONNX Runtime in ORT_DYLIB_PATH, a Python that has torch and safetensors in PYTHON, and, where
# there is no Rust, the folder of what `tests/gpu/run.sh build` made elsewhere in MUDIT_PROOF_BIN.
set -uo pipefail
cd "$(dirname "$0")/../.."
peers=yes try=
while [[ ${1:-} == --* ]]; do
  case $1 in
    --no-peers) peers=no ;;
    --try) try=yes ;;
    *) sed -n '2,16p' "$0" >&2; exit 2 ;;
  esac
  shift
done
all="doctor kernels device answers-S2 answers-XL2 curves speed"
parts=${*:-$all}
for part in $parts; do
  [[ " build $all " == *" ${part%%:*} "* ]] || { echo "no such part: $part (there are: build $all)" >&2; exit 2; }
done
work=$PWD/target/gpu-proof${try:+-try}
bin=$(realpath -m "${MUDIT_PROOF_BIN:-$work/bin}")
mkdir -p "$work"
results=$([ "$try" ] && echo "$work" || echo "$PWD/tests/results")

# --- libraries -----------------------------------------------------------------------------------------------------------
notes=()
if [ -z "${MUDIT_CUDA_LIBRARIES:-}$try" ]; then
  venv=$PWD/target/gpu-venv
  [ -x "$venv/bin/python" ] || python3 -m venv "$venv" || exit 1
  # mudit finds libraries in the packages of the first python3.
  export PATH=$venv/bin:$PATH
  pip() { "$1" -m pip install -q --disable-pip-version-check "${@:2}"; }
  pip python3 onnxruntime-gpu==1.31.1 nvidia-cuda-runtime==13.0.96 nvidia-cuda-nvrtc==13.0.88 nvidia-cublas==13.1.0.3 \
    nvidia-curand==10.4.0.35 nvidia-cufft==12.0.0.61 nvidia-cudnn-cu13==9.13.0.50 || exit 1
  # Its packages fetch the libraries from the vendor's own index, which not every machine reaches.
  timeout 900 "$venv/bin/python" -m pip install -q --disable-pip-version-check tensorrt-cu13==10.16.1.11 ||
    notes+=("TensorRT could not be installed: nothing of it was tried.")
  if [ $peers = yes ] && [ -z "${PYTHON:-}" ]; then
    python3 -m venv target/gpu-peers &&
      pip target/gpu-peers/bin/python torch==2.15.0 diffusers==0.42.1 numpy==2.4.6 safetensors==0.8.0 ||
      notes+=("PyTorch could not be installed.")
  fi
fi
python=${PYTHON:-$PWD/target/gpu-peers/bin/python}

# --- programs ------------------------------------------------------------------------------------------------------------
build() {
  local chosen=(--locked -p mudit-tests -p runtime --features mudit-tests/peers) folder=${CARGO_TARGET_DIR:-target}/debug log
  if [ -z "$try" ]; then chosen+=(--release) folder=${folder%debug}release; fi
  mkdir -p "$bin"
  cargo build "${chosen[@]}" -p mudit --bins || return 1
  log=$(cargo test "${chosen[@]}" --lib --test gpu --no-run 2>&1) || { echo "$log"; return 1; }
  for program in mudit mudit-speed-worker mudit-under-test; do cp -f "$folder/$program" "$bin/" || return 1; done
  # Cargo says where it put the tests.
  executable() { sed -n "s/.*Executable.*(\(.*\/$1-[0-9a-f]*\))\$/\1/p" <<< "$log"; }
  cp -f "$(executable gpu)" "$bin/device-tests" && cp -f "$(executable runtime)" "$bin/kernel-tests"
}
if [ -z "${MUDIT_PROOF_BIN:-}" ]; then
  build || { echo "the build failed" >&2; exit 1; }
fi
if [ "$try" ]; then gpu=cpu device=cpu providers=cpu; else
  # NVIDIA_TF32_OVERRIDE: TensorRT would round f32 products.
  export MUDIT_NEEDS_GPU=1 NVIDIA_TF32_OVERRIDE=0
  gpu=cuda device=cuda providers=cuda
  if "$bin/mudit" doctor | grep -q 'provider tensorrt *ok'; then providers=cuda,tensorrt; fi
fi

# --- parts ---------------------------------------------------------------------------------------------------------------
tests() { (cd "$1" && CARGO_MANIFEST_DIR=$PWD MUDIT_UNDER_TEST=$bin/mudit-under-test "$bin/$2" "${@:3}"); }
peer() { "$python" -B tests/peers/"$@"; }
answers() { peer answers.py --worker "$bin/mudit-speed-worker" --device $device --provider "$providers" --work "$work" "$@"; }
doctor() { "$bin/mudit" doctor; }
kernels() { MUDIT_NEEDS_NVRTC=1 tests runtime kernel-tests cuda::kernels; }
device() {
  if [ "$try" ]; then MUDIT_TRY_ON_CPU=1 tests tests device-tests --test-threads=1 --nocapture runs::
  else tests tests device-tests --test-threads=1 --nocapture; fi
}
answers_S2() {
  if [ "$try" ]; then answers --model DiT-S/8@16x16x4:10 --batch 2 --threads 1 --out "$1"; else answers --model DiT-S/2 --batch 16 --out "$1"; fi
}
answers_XL2() {
  if [ "$try" ]; then answers --model DiT-S/4@8x8x4:10 --batch 2 --precisions f32 --threads 1 --out "$1"
  else answers --model DiT-XL/2 --batch 8 --out "$1"; fi
}
curves() {
  local small=(--model DiT-S/2)
  [ -z "$try" ] || small=(--model DiT-S/8@16x16x4:10 --batch 8 --threads 1 --precisions f32)
  peer curves.py --mudit "$bin/mudit" --device $device --provider $gpu "${small[@]}" --out "$1"
}
speed() {
  local options=(--worker "$bin/mudit-speed-worker" --providers "$providers" --device $device --out "$results/gpu-speed")
  if [ $peers = yes ] && command -v "$python" > /dev/null; then options+=(--python "$python"); fi
  if [ "$try" ]; then
    options+=(--try --rounds 2 --threads 1)
    [ $# -gt 1 ] || set -- - guided-XL2-b64 train-XL2-b256 copy-XL2 update-XL2
  fi
  python3 -B tests/gpu/speed.py "${options[@]}" "${@:2}"
}

# Runs a part with a limit of its own; keeps what it said, how it ended and its table.
part() {
  local name=$1 limit=$2 start=$SECONDS code; shift 2
  printf '\n== %s\n' "$name"
  # A function has no process of its own that `timeout` could end: a shell has.
  export -f tests peer answers doctor kernels device answers_S2 answers_XL2 curves speed
  export work bin python device gpu providers peers try results
  timeout "$limit" bash -c '"$@"' -- "$@" 2>&1 | tee "$work/$name.log"
  code=${PIPESTATUS[0]}
  local seconds=$((SECONDS - start)) outcome
  case $code in
    0) outcome=passed ;;
    124) outcome="**failed**: longer than $limit s" ;;
    *) outcome="**failed** ($code): $(grep -v '^ *$' "$work/$name.log" | tail -1 | tr '|' '/' | cut -c1-300)" ;;
  esac
  if [ "$name" = device ] && [ "$code" = 0 ]; then
    outcome="passed$(grep -c 'SKIPPED:' "$work/$name.log" | sed '/^0$/d; s/.*/, & skipped/')"
  fi
  if [ "$name" = speed ] && [ "$code" = 0 ]; then
    outcome="passed$(grep -cF '**not met**' "$results/gpu-speed.md" | sed '/^0$/d; s/.*/, & aims **not met**/')"
  fi
  echo "| $name | $outcome | $seconds | $(date +%F) |" > "$work/$name.outcome"
}

skip() { echo "== $1: $2"; echo "| $1 | skipped: $2 | | $(date +%F) |" > "$work/$1.outcome"; }
for name in $parts; do
  rows=${name#*:} name=${name%%:*}
  if [[ $name == answers-* || $name == curves ]]; then
    if [ $peers = no ]; then skip "$name" "it compares with PyTorch"; continue; fi
    rm -f "$work/$name.md"
  fi
  case $name in
    build) [ -n "${MUDIT_PROOF_BIN:-}" ] || echo "$bin" ;;
    doctor) part doctor 120 doctor ;;
    kernels) part kernels 900 kernels ;;
    device) part device 3600 device ;;
    answers-S2) part answers-S2 900 answers_S2 "$work/answers-S2.md" ;;
    answers-XL2) part answers-XL2 3600 answers_XL2 "$work/answers-XL2.md" ;;
    curves) part curves 1800 curves "$work/curves.md" ;;
    speed) [ "$rows" = speed ] && rows=
      # shellcheck disable=SC2086
      part speed 21600 speed - ${rows//,/ } ;;
  esac
done

# --- results -------------------------------------------------------------------------------------------------------------
version() { "$1" -c "import importlib.metadata as m; print(m.version('$2'))" 2>/dev/null || echo none; }
report() {
  echo "# The proof on a GPU"
  echo
  echo "Made by \`tests/gpu/run.sh\` of $(git rev-parse --short HEAD 2>/dev/null || echo unknown)."
  [ -z "$try" ] || printf '\n**Tried on the CPU with small models: this says nothing about a GPU.**\n'
  echo
  echo "- GPU: $(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo none)"
  echo "- Machine: $(uname -srm), $(nproc) cores"
  echo "- mudit $("$bin/mudit" --version 2>/dev/null | cut -d' ' -f2), PyTorch $([ $peers = yes ] && version "$python" torch || echo none)"
  for note in "${notes[@]:-}"; do [ -z "$note" ] || echo "- $note"; done
  printf '\n| part | outcome | seconds | day |\n|---|---|---|---|\n'
  for name in $all; do cat "$work/$name.outcome" 2>/dev/null || echo "| $name | not run | | |"; done
  printf '\nFigures of speed, and the aims they are held against: gpu-speed.md.\n'
  printf '\n## What was found\n\n```\n'
  cat "$work/doctor.log" 2>/dev/null
  printf '```\n\n## Beside PyTorch on the same device\n\n'
  cat "$work"/answers-*.md 2>/dev/null
  printf '## Training beside PyTorch\n\n'
  cat "$work/curves.md" 2>/dev/null
}
[ "$parts" = build ] && exit 0
report > "$results/gpu-proof.md.new"
mv "$results/gpu-proof.md.new" "$results/gpu-proof.md"
printf '\n'
sed -n '/^| part/,/^$/p' "$results/gpu-proof.md"
echo "$results/gpu-proof.md"
for name in $parts; do
  if grep -q failed "$work/${name%%:*}.outcome" 2>/dev/null; then exit 1; fi
done
