#!/usr/bin/env bash
# SFT -> reward model -> PPO with KL -> GIPO at tiny size, and one report of all four.
# bash launch/demo.sh [PREFERENCE_DATA]       DEMO_PROCESSES=2 by default; DEMO_DIR=runs/demo
set -euo pipefail
cd "$(dirname "$0")/.."
DATA="${1:-}"
DIR="${DEMO_DIR:-runs/demo}"
PROCESSES="${DEMO_PROCESSES:-2}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if [ -n "$DATA" ] && [ ! -e "$DATA" ]; then
    echo "no data at $DATA (counted from $PWD)" >&2
    exit 2
fi
# Real text is ten times longer than the planted data: fewer steps keep the demo within coffee time.
OVERRIDES=()
SFT=() RM=() PPO=()
if [ -n "$DATA" ]; then
    OVERRIDES=("with=data/demo" "data.path=$DATA")
    SFT=("run.steps=150") RM=("run.steps=100") PPO=("run.steps=20" "run.eval_prompts=64")
fi

stage() { # NAME OVERRIDES...
    local name="$1"
    shift
    echo
    echo "=== $name ==="
    torchrun --nproc-per-node "$PROCESSES" launch/train.py "recipe=tiny/$name" "run.dir=$DIR/$name" "${OVERRIDES[@]}" "$@"
}

stage sft "${SFT[@]}"
stage rm "models.reward.load=$DIR/sft/final" "${RM[@]}"
stage ppo_kl "models.actor.load=$DIR/sft/final" "models.reward.load=$DIR/rm/final" "${PPO[@]}"
stage gipo "models.actor.load=$DIR/sft/final" "models.reward.load=$DIR/rm/final" "${PPO[@]}"

echo
python tools/plot.py "$DIR/sft" "$DIR/rm" "$DIR/ppo_kl" "$DIR/gipo" "out=$DIR/figures" "report=$DIR/report.html"
