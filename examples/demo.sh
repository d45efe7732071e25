#!/usr/bin/env bash
# The main job on real images, start to end: what `make demo` runs after its set-up.
# Every step is the command that a person would type; results go to $OUT.
set -euo pipefail

BIN=${BIN:-.venv/bin}
OUT=${OUT:-artifacts/demo}
EPOCHS=${EPOCHS:-2}

step() {
  printf '\n== %s\n' "$1"
}

run() {
  printf '$ python %s\n' "$*"
  "$BIN/python" "$@"
}

rm -rf "$OUT"
mkdir -p "$OUT"

step "1/6 Pretrain an encoder, without labels"
run -m train.pretrain fashion-mnist --epochs "$EPOCHS" --out "$OUT/run"

step "2/6 Export it to ONNX, and check it against torch"
run -m train.export "$OUT/run" --out "$OUT/bundle"

step "3/6 Index the 60,000 training images"
run -m index.build --images fashion-mnist:train --encoder "$OUT/bundle" --out "$OUT/collection"

step "4/6 kNN evaluation on the 10,000 test images, beside the baselines"
run -m index.evaluate knn --collection "$OUT/collection" --images fashion-mnist:test --out "$OUT"

step "5/6 Serve, and search over gRPC with test images"
run examples/search_over_grpc.py "$OUT/bundle" "$OUT/collection" --grid "$OUT/search.png"

step "6/6 Done, after $((SECONDS / 60)) minutes"
cp "$OUT/run/curves.png" "$OUT/curves.png"
cat <<TEXT
In $OUT:
$(cd "$OUT" && find . -maxdepth 1 -name '*.png' | sort | sed 's|^\./|  |')
  run/         checkpoints, log.jsonl, TensorBoard events
  bundle/      encoder.onnx and bundle.json
  collection/  the index of 60,000 images

Try next:
  python -m index.search $OUT/collection --help
  python -m train.report $OUT/run
  python -m serve --bundle $OUT/bundle --collection $OUT/collection
  python -m train.pretrain folder:YOUR_IMAGES
(with $BIN/python, or after: source $BIN/activate)
TEXT
