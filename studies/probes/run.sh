#!/usr/bin/env bash
# The probe table: what each method's motion code, pre-trained on real clips and on rendered bodies, knows of motion.
# usage: run.sh OUT CLIPS     (CLIPS: a clip store of real videos, by `localmotion extract`)
# Every step is skipped where its result exists, and goes on where it was stopped.
set -euo pipefail
OUT=$1 CLIPS=$2
UPDATES=${UPDATES:-2000} THREADS=${THREADS:-1}
mkdir -p "$OUT"

# Rendered bodies: eight of dm_control that are not probed as unseen. The probed ones are walker (unseen) and hopper (in domain, other seeds).
for task in hopper_hop finger_spin reacher_easy cartpole_swingup acrobot_swingup ball_in_cup_catch fish_swim swimmer_swimmer6; do
  localmotion collect "dmc:$task" --out "$OUT/videos/$task" --policy smooth --episodes 24 --steps 100 --seed 0
done
[ -e "$OUT/bodies/.done" ] || { localmotion extract "$OUT/videos" --out "$OUT/bodies" && touch "$OUT/bodies/.done"; }
localmotion collect dmc:walker_walk --out "$OUT/walker" --store --policy smooth --episodes 60 --steps 100 --seed 1
localmotion collect dmc:hopper_hop --out "$OUT/hopper" --store --policy smooth --episodes 60 --steps 100 --seed 1

pretrain() { # name, data, arguments
  localmotion pretrain --data "$2" --run "$OUT/$1" --preset small --pretrain.updates "$UPDATES" --threads "$THREADS" --pretrain.eval_every 1000 "${@:3}"
}
for kind in clips bodies; do
  data=$CLIPS; [ $kind = bodies ] && data=$OUT/bodies
  pretrain "drp_$kind" "$data" --method drp
  pretrain "global_$kind" "$data" --method drp --motion_encoder global
  pretrain "ipv_$kind" "$data" --method ipv
done
localmotion probe "$OUT"/{drp,global,ipv}_{clips,bodies} --data "$OUT/walker" --data "$OUT/hopper" --out "$OUT/probes.json"
