#!/usr/bin/env bash
# Trains the bundled model from random weights, in the order of the paper: A, image encoder, B, text encoder, C, B again.
#   bash tiny/train.sh runs/scratch          # about six hours on two CPU cores; run it again to resume where it stopped
# docs/TRAINING.md explains the steps. The result is the folder OUT/model, which sample.py --weights takes.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in -*) sed -n 's/^# //p' "$0" | head -n 3; exit ;; esac
out=${1:-runs/scratch}
dtype=fp32      # bf16 halves the time of Stage B, but only on a CPU that multiplies bfloat16
if grep -qs avx512_bf16 /proc/cpuinfo; then dtype=bf16; fi

# Stage A. Its encoder's training stops early: its latents are then easier for Stage B. Its decoder is trained further.
python train_a.py --steps 1400 --out "$out/a_1400" --resume auto
python train_a.py --init "$out/a_1400/vqgan" --freeze-encoder --steps 8000 --out "$out/a" --resume auto

# The image encoder by itself, then together with Stage B, then the text encoder.
python -m tiny.train_encoder --out "$out/encoder" --resume auto
python train_b.py --init random --config models/tiny --vqgan "$out/a_1400/vqgan" --image-encoder "$out/encoder/image_encoder" \
    --text-encoder none --cache "$out/cache" --loss head --even-contrast --compile --dtype $dtype --steps 2500 \
    --out "$out/b" --resume auto
python -m tiny.train_text --image-encoder "$out/b/image_encoder" --out "$out/text" --resume auto

# Stage C: three runs of 3000 steps. In each run the learning rate falls to 0.
train_c() {
    python train_c.py --weights tiny "$@" --image-encoder "$out/b/image_encoder" --prior-text-encoder "$out/text/text_encoder" \
        --data scenes:captioned:32000:2 --cache "$out/cache" --batch 64 --steps 3000 --lr 2e-3 --warmup 200 \
        --schedule linear --ema 0.998 --loss-weight v --resume auto
}
train_c --init random --config models/tiny/prior/config.json --out "$out/c"
train_c --prior "$out/c/prior" --seed 1 --out "$out/c_more"
train_c --prior "$out/c_more/prior" --seed 2 --out "$out/c_last"

# Stage B again, now conditioned on the text. The image encoder stays as it is, so Stage C stays valid.
train_b() {
    python train_b.py --vqgan "$out/a_1400/vqgan" --decoder "$1" --image-encoder "$out/b/image_encoder" \
        --text-encoder "$out/text/text_encoder" --freeze-encoder --cache "$out/cache" --loss head --even-contrast \
        --compile --dtype $dtype "${@:2}" --resume auto
}
judge() {       # measures how often the model with this run's Stage B is right, and how sharp its images are
    if [ ! -e "$out/$1.json" ]; then
        mkdir -p "$out/model"
        cp -r "$out"/{a/vqgan,"$1"/decoder,b/image_encoder,c_last/prior,c_last/scheduler,text/text_encoder,text/tokenizer} "$out/model"
        python -m tiny.evaluate --weights "$out/model" --sharp --out "$out/$1.json"
    fi
}
train_b "$out/b/decoder" --steps 21000 --out "$out/b_text"
judge b_text
train_b "$out/b_text/decoder" --steps 20000 --seed 1 --out "$out/b_more"
judge b_more
train_b "$out/b_more/decoder" --steps 10000 --seed 2 --out "$out/b_last"
judge b_last
echo "done: python sample.py --weights $out/model --prompt \"a red apple on a blue background\""
