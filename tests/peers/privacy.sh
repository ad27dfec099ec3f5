#!/usr/bin/env bash
# A training of 40 seconds in a new home under strace: no address is looked up or reached, and the home stays empty. ONNX
# Runtime's telemetry, which mudit keeps from starting, looks its host up after ten. Needs strace and python3.
set -euo pipefail
cd "$(dirname "$0")/../.."
cargo build --locked -q -p mudit
mudit=$(realpath "${CARGO_TARGET_DIR:-target}/debug/mudit")
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
mkdir "$place/home"
python3 - "$place" <<'PYTHON'
import pathlib, struct, sys
place = pathlib.Path(sys.argv[1])
n, side = 64, 8
(place / "train-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, n, side, side) + bytes(i * 37 % 256 for i in range(n * side * side)))
(place / "train-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, n) + bytes(i % 4 for i in range(n)))
PYTHON
cat > "$place/run.toml" <<TOML
[model]
patch_size = 4
hidden_size = 24
depth = 2
num_heads = 2
[data]
kind = "idx"
path = "$place"
[train]
steps = 100_000_000
batch_size = 8
TOML
cache=${MUDIT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mudit}
# What is fetched is fetched before.
"$mudit" train --config "$place/run.toml" --set train.steps=1 --out "$place/first" >/dev/null
code=0
env -i PATH="$PATH" HOME="$place/home" MUDIT_CACHE="$cache" MUDIT_THREADS=1 \
  timeout --signal=INT 40 strace -f -qq -e trace=connect,sendto,sendmsg,sendmmsg -o "$place/calls" \
  "$mudit" train --config "$place/run.toml" --out "$place/run" --offline >/dev/null 2>"$place/log" || code=$?
[ -d "$place/run/checkpoints" ] || { cat "$place/log"; echo "the training did not run (exit code $code)"; exit 1; }
if grep AF_INET "$place/calls"; then echo "addresses were looked up or reached"; exit 1; fi
left=$(find "$place/home" -mindepth 1)
[ -z "$left" ] || { echo "left in the home: $left"; exit 1; }
echo "nothing was sent, nothing was left behind"
