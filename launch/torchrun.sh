#!/bin/bash
# A pretraining run on one machine or several without SLURM; start it on every machine.
#
#   [SETTING=VALUE]... launch/torchrun.sh RECIPE [--fork RUN] [KEY=VALUE]...
#
# --fork RUN, a checkpoint or a run folder: a new run, with a name of its own, begins with that one's state.
# Ctrl-C, TERM and USR1 make the run save and end; the same command goes on from there. A second one ends it at once.
# Settings, from the environment:
#   FUNDUSFM_SITE   a script to read first: venv, NCCL_SOCKET_IFNAME     (launch/site.sh if it is there)
#   RANKS           processes on this machine, one a GPU                 (its GPUs; without any, 1)
#   NODES           machines                                             (1)
#   MASTER_ADDR     name or address of the first machine                 (localhost; needed if NODES is above 1)
#   MASTER_PORT     a port that is free there                            (29500; one that is free if NODES is 1)
#   RUN_ID          a word that the machines of one run share            (fundusfm)
#   MAX_RESTARTS    new starts of all ranks after one has died           (3)
set -uo pipefail

usage="usage: [SETTING=VALUE]... launch/torchrun.sh RECIPE [--fork RUN] [KEY=VALUE]..."
die() { printf '%s\n' "$*" >&2; exit 2; }

what=() fork=()
while (($#)); do
  case $1 in
    --fork) (($# >= 2)) || die "$usage"; fork=(--fork "$2"); shift ;;
    --fork=*) fork=("$1") ;;
    *) what+=("$1") ;;
  esac
  shift
done
((${#what[@]})) || die "$usage"
site=${FUNDUSFM_SITE:-launch/site.sh}
# Without -u: what activates conda or modules reads variables that are not set.
# shellcheck source=/dev/null
[[ ! -r $site ]] || { set +u; source "$site"; set -u; }
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))} nodes=${NODES:-1}
if ((nodes > 1)) && [[ -z ${MASTER_ADDR:-} ]]; then
  die "NODES=$nodes needs MASTER_ADDR, the first machine, on every machine"
fi
what+=("trainer.devices=$ranks" "trainer.nodes=$nodes")
# With port 0 each run of one machine has a store of its own; several machines must know where to meet.
port=${MASTER_PORT:-$((nodes > 1 ? 29500 : 0))}
# A recipe that cannot be ends here, once, before any rank is started.
fundusfm recipe folder "${what[@]}" >/dev/null || exit
notes=$(mktemp -d -t fundusfm.XXXXXX) || exit
FUNDUSFM_STOP_FLAG=$notes/stop FUNDUSFM_REFUSED_FILE=$notes/refused
export FUNDUSFM_STOP_FLAG FUNDUSFM_REFUSED_FILE OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

asked=0 torchrun=
# shellcheck disable=SC2317,SC2329  # traps call it
ask() {
  ((asked == 0)) || kill -TERM "$torchrun"
  asked=1
  : >"$FUNDUSFM_STOP_FLAG"
}
trap ask INT TERM USR1
trap 'rm -rf "$notes"' EXIT
# In a session of its own: torchrun would end the ranks 30 seconds after a Ctrl-C, saved or not.
setsid torchrun --nnodes="$nodes" --nproc-per-node="$ranks" --max-restarts="${MAX_RESTARTS:-3}" \
  --rdzv-backend=c10d --rdzv-endpoint="${MASTER_ADDR:-localhost}:$port" \
  --rdzv-id="${RUN_ID:-fundusfm}" -m fundusfm pretrain "${what[@]}" --resume-if-any "${fork[@]}" &
torchrun=$!
while :; do
  wait "$torchrun"
  code=$?
  kill -0 "$torchrun" 2>/dev/null || break
done
# torchrun has no code 2: it would start the ranks again, which then end at once, or ends with 1.
[[ ! -e $FUNDUSFM_REFUSED_FILE ]] || code=2
exit "$code"
