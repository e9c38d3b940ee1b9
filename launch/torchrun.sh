#!/bin/bash
# A pretraining run on one machine or several without SLURM; start it on every machine.
#
#   [SETTING=VALUE]... launch/torchrun.sh RECIPE [KEY=VALUE]...
#
# Ctrl-C, TERM and USR1 make the run save and end; the same command goes on from there. A second one ends it at once.
# Settings, from the environment:
#   FUNDUSFM_SITE   a script to read first: venv, NCCL_SOCKET_IFNAME     (launch/site.sh if it is there)
#   RANKS           processes on this machine, one a GPU                 (its GPUs; without any, 1)
#   NODES           machines                                             (1)
#   MASTER_ADDR     name or address of the first machine                 (localhost; needed if NODES is above 1)
#   MASTER_PORT     a port that is free there                            (29500)
#   RUN_ID          a word that the machines of one run share            (fundusfm)
#   MAX_RESTARTS    new starts of all ranks after one has died           (3)
set -uo pipefail

if (($# < 1)); then
  echo "usage: [SETTING=VALUE]... launch/torchrun.sh RECIPE [KEY=VALUE]..." >&2
  exit 2
fi
site=${FUNDUSFM_SITE:-launch/site.sh}
# shellcheck source=/dev/null
[[ ! -r $site ]] || source "$site"
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))} nodes=${NODES:-1}
if ((nodes > 1)) && [[ -z ${MASTER_ADDR:-} ]]; then
  echo "NODES=$nodes needs MASTER_ADDR, the first machine, on every machine" >&2
  exit 2
fi
world=("trainer.devices=$ranks" "trainer.nodes=$nodes")
# A recipe that cannot be ends here, once, before any rank is started.
fundusfm recipe folder "$@" "${world[@]}" >/dev/null || exit 2
FUNDUSFM_STOP_FLAG=$(mktemp -u -t fundusfm-stop.XXXXXX)
export FUNDUSFM_STOP_FLAG OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

asked=0 torchrun=
# shellcheck disable=SC2317,SC2329  # traps call it
ask() {
  ((asked == 0)) || kill -TERM "$torchrun"
  asked=1
  : >"$FUNDUSFM_STOP_FLAG"
}
trap ask INT TERM USR1
trap 'rm -f "$FUNDUSFM_STOP_FLAG"' EXIT
# In a session of its own: torchrun would end the ranks 30 seconds after a Ctrl-C, saved or not.
setsid torchrun --nnodes="$nodes" --nproc-per-node="$ranks" --max-restarts="${MAX_RESTARTS:-3}" \
  --rdzv-backend=c10d --rdzv-endpoint="${MASTER_ADDR:-localhost}:${MASTER_PORT:-29500}" \
  --rdzv-id="${RUN_ID:-fundusfm}" -m fundusfm pretrain "$@" "${world[@]}" --resume-if-any &
torchrun=$!
while :; do
  wait "$torchrun"
  code=$?
  kill -0 "$torchrun" 2>/dev/null || break
done
exit "$code"
