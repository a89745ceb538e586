#!/usr/bin/env bash
# Trains the bundled model from random weights: A, image encoder, B, text encoder, B again, C.
#   bash tiny/train.sh runs/scratch          # its steps took nine hours, most of them on one core; run it again to resume
# docs/TRAINING.md explains the steps. The result is the folder OUT/model, which sample.py --weights takes.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in -*) sed -n 's/^# //p' "$0" | head -n 3; exit ;; esac
out=${1:-runs/scratch}
dtype=fp32      # bf16 halves the time of Stage B, but only on a CPU that multiplies bfloat16
if grep -qs avx512_bf16 /proc/cpuinfo; then dtype=bf16; fi

# ----- varied scenes: 128 objects, in any size and at any place --------------------------------------

# Stage A. Its encoder's training stops early: its latents are then easier for Stage B. Its decoder is trained further.
python train_a.py --data scenes:varied:100000:0 --steps 1400 --out "$out/a_1400" --resume auto
python train_a.py --data scenes:varied:100000:0 --init "$out/a_1400/vqgan" --freeze-encoder --steps 8000 \
    --out "$out/a" --resume auto

# The image encoder by itself, then together with Stage B, then the text encoder.
python -m tiny.train_encoder --out "$out/encoder" --resume auto
python train_b.py --init random --config models/tiny --vqgan "$out/a_1400/vqgan" --image-encoder "$out/encoder/image_encoder" \
    --text-encoder none --data scenes:varied:32000:1 --cache "$out/cache" --loss head --even-contrast --compile --dtype $dtype \
    --steps 2500 --out "$out/b" --resume auto
python -m tiny.train_text --image-encoder "$out/b/image_encoder" --out "$out/text" --resume auto

# Stage B again, now conditioned on the text. The image encoder stays as it is, so Stage C will fit.
train_b() {
    python train_b.py --vqgan "$out/a_1400/vqgan" --decoder "$1" --image-encoder "$out/b/image_encoder" \
        --text-encoder "$out/text/text_encoder" --freeze-encoder --cache "$out/cache" --loss head --even-contrast \
        --compile --dtype $dtype "${@:2}" --resume auto
}
train_b "$out/b/decoder" --data scenes:varied:32000:1 --steps 21000 --out "$out/b_text"
train_b "$out/b_text/decoder" --data scenes:varied:32000:1 --steps 20000 --seed 1 --out "$out/b_more"
train_b "$out/b_more/decoder" --data scenes:varied:32000:1 --steps 10000 --seed 2 --out "$out/b_last"

# ----- the scenes that the model will show: 80 objects, in three sizes, on a grid --------------------

train_b "$out/b_last/decoder" --data scenes:all:32000:1 --steps 13500 --out "$out/b_sharp"
train_b "$out/b_sharp/decoder" --data scenes:all:32000:1 --steps 14500 --schedule linear --seed 1 --out "$out/b_sharper"

# Stage C does not need Stage B, only the image encoder.
train_c() {
    python train_c.py --weights tiny --image-encoder "$out/b/image_encoder" --prior-text-encoder "$out/text/text_encoder" \
        --data scenes:captioned:32000:2 --cache "$out/cache" --batch 64 --lr 2e-3 --warmup 200 --schedule linear \
        --ema 0.998 --loss-weight v "$@" --resume auto
}
train_c --init random --config models/tiny/prior/config.json --steps 9000 --out "$out/c"
train_c --prior "$out/c/prior" --seed 1 --steps 6500 --out "$out/c_more"

# How often the model is right, and how sharp its images are.
if [ ! -e "$out/evaluation.json" ]; then
    mkdir -p "$out/model"
    cp -r "$out"/{a/vqgan,b_sharper/decoder,b/image_encoder,c_more/prior,c_more/scheduler,text/text_encoder,text/tokenizer} "$out/model"
    python -m tiny.evaluate --weights "$out/model" --seeds 4 --sharp --out "$out/evaluation.json"
fi
echo "done: python sample.py --weights $out/model --prompt \"a red apple on a blue background\""
