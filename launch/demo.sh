#!/usr/bin/env bash
# SFT -> reward model -> PPO with KL -> GIPO at tiny size, one report of all four, and whether GIPO's
# claim holds on them (on PREFERENCE_DATA, which has no gold reward, it is not checked).
# Run it again and it continues.
#
# bash launch/demo.sh [PREFERENCE_DATA]
#
# DEMO_PROCESSES  2
# DEMO_DIR        runs/demo, with data runs/demo_data
set -euo pipefail
cd "$(dirname "$0")/.."
DATA="${1:-}"
PROCESSES="${DEMO_PROCESSES:-2}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

OVERRIDES=() SFT_MORE=() RM_MORE=() PPO_MORE=()
if [ -z "$DATA" ]; then
    DIR="${DEMO_DIR:-runs/demo}"
    # where the other tiny recipes look for them
    SFT="${DEMO_DIR:-runs/tiny}_sft" RM="${DEMO_DIR:-runs/tiny}_rm"
elif [ -e "$DATA" ]; then
    DIR="${DEMO_DIR:-runs/demo_data}"
    SFT="$DIR/sft" RM="$DIR/rm"
    OVERRIDES=("with=data/demo" "data.path=$DATA")
    # Real text is ten times longer than the planted data: fewer steps keep the demo short.
    SFT_MORE=("run.steps=150")
    RM_MORE=("run.steps=100")
    PPO_MORE=("run.steps=20" "run.eval_prompts=64")
else
    echo "no data at $DATA (counted from $PWD)" >&2
    exit 2
fi

stage() { # NAME RUN_DIR OVERRIDES...
    echo
    echo "=== $1 ==="
    python launch/train.py --nproc "$PROCESSES" \
        "recipe=tiny/$1" "run.dir=$2" "${OVERRIDES[@]}" "${@:3}"
    [ -e "$2/final" ] || exit 130 # interrupted, with a checkpoint
}

LOADS=("models.actor.load=$SFT/final" "models.reward.load=$RM/final")
stage sft "$SFT" "${SFT_MORE[@]}"
stage rm "$RM" "models.reward.load=$SFT/final" "${RM_MORE[@]}"
stage ppo_kl "$DIR/ppo_kl" "${LOADS[@]}" "${PPO_MORE[@]}"
stage gipo "$DIR/gipo" "${LOADS[@]}" "${PPO_MORE[@]}"

echo
python tools/plot.py "$SFT" "$RM" "$DIR/ppo_kl" "$DIR/gipo" "out=$DIR/figures"
python tools/claim.py "$DIR/ppo_kl" "$DIR/gipo" --also "$SFT" "$RM" --report "$DIR/report.html"
