#!/bin/bash
# A SLURM cluster of two virtual nodes on this machine, for tests; needs root and Debian's or Ubuntu's packages.
#
#   cluster.sh up DIR      start it; DIR/env.sh then sets SLURM_CONF. DIR: empty or new, short, no odd characters
#   cluster.sh down DIR    cancel all jobs, end all daemons and what the jobs left behind
#
# Each node has its own host name and address. Exit codes: 0 done, 1 it did not start, 3 it cannot run here.
set -uo pipefail
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
PACKAGES=(slurmctld slurmd slurm-client munge)
NODES=2

die() { local code=$1; shift; printf 'cluster.sh: %s\n' "$*" >&2; exit "$code"; }

have_packages() {
  local one
  for one in munged slurmctld slurmd sbatch srun scontrol unshare; do command -v "$one" >/dev/null || return 1; done
}
install_packages() {
  have_packages && return
  command -v apt-get >/dev/null || die 3 "there are no packages of SLURM, and no apt-get"
  export DEBIAN_FRONTEND=noninteractive
  # Another apt-get may be at work: wait for its lock.
  { apt-get -o DPkg::Lock::Timeout=300 update &&
    apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "${PACKAGES[@]}"; } >"$dir/log/apt.log" 2>&1
  have_packages || die 3 "apt-get cannot install ${PACKAGES[*]}: $(tail -n 1 "$dir/log/apt.log")"
}

until_true() { # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < end)) || return 1
    sleep 0.2
  done
}
is_busy() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
free_ports() { # the first of NODES + 1 ports that nobody listens on
  local port i
  for ((port = 26817; port < 32000; port += NODES + 1)); do
    for ((i = 0; i <= NODES; i++)); do is_busy $((port + i)) && continue 2; done
    echo "$port"
    return
  done
  die 1 "no ports are free"
}
launch() { # NAME COMMAND...: a daemon in a session of its own
  local name=$1
  shift
  setsid "$@" </dev/null >>"$dir/log/$name.out" 2>&1 &
  echo "$!" >>"$dir/pids"
}

write_settings() {
  local port=$1 host i version
  host=$(hostname -s)
  cat >"$dir/etc/slurm.conf" <<CONF
ClusterName=tests$port
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits; 120 seconds by default.
AuthInfo=socket=$dir/run/munge.sock,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
MailProg=/bin/true
# No control groups and no systemd: nothing is enforced, only scheduled.
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=512
# Nodes may claim more cores than this machine has.
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=60
# A node that has not answered in time is sent the same signal a minute later. By then the job may have been requeued,
# and its new step, which has the name of the old one, is ended by what was meant for that; 10 seconds by default.
MessageTimeout=100
KillWait=${CLUSTER_KILL_WAIT:-120}
MinJobAge=3600
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
CONF
  for ((i = 1; i <= NODES; i++)); do
    echo "NodeName=node$i NodeAddr=127.0.0.$((10 + i)) Port=$((port + i)) CPUs=8 RealMemory=8192 State=UNKNOWN"
  done >>"$dir/etc/slurm.conf"
  echo "PartitionName=main Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF State=UP" >>"$dir/etc/slurm.conf"
  # slurmd must not look for control groups: newer ones load a plugin though nothing uses it.
  version=$(slurmd -V | grep -oE '[0-9]+\.[0-9]+' | head -n 1)
  version=$((10#${version%.*}${version#*.}))
  if ((version >= 2405)); then
    echo CgroupPlugin=disabled >"$dir/etc/cgroup.conf"
  elif ((version >= 2205)); then
    echo CgroupPlugin=cgroup/v1 >"$dir/etc/cgroup.conf"
  fi
  cp /etc/hosts "$dir/etc/hosts"
  for ((i = 1; i <= NODES; i++)); do echo "127.0.0.$((10 + i)) node$i" >>"$dir/etc/hosts"; done
  (umask 077 && head -c 1024 /dev/urandom >"$dir/etc/munge.key")
  echo "export SLURM_CONF=$dir/etc/slurm.conf" >"$dir/env.sh"
}

is_up() { timeout 5 scontrol ping 2>/dev/null | grep -q "is UP"; }
all_idle() { [[ $(timeout 5 sinfo -h -N -o %T 2>/dev/null | grep -c '^idle$') == "$NODES" ]]; }
no_jobs() { [[ -z $(timeout 5 squeue -h -o %A 2>/dev/null) ]]; }

up() {
  local i
  ((EUID == 0)) || die 3 "a cluster with a host name a node needs root"
  unshare --uts --mount sh -c 'hostname node0 && mount --bind /etc/hosts /etc/hosts' 2>/dev/null ||
    die 3 "namespaces are not allowed here"
  mkdir -p "$dir"/{etc,run,log,state,spool/node1,spool/node2} && chmod 755 "$dir" "$dir"/{etc,run,log,state,spool}
  install_packages
  write_settings "$(free_ports)"
  export SLURM_CONF=$dir/etc/slurm.conf
  # --force: the folder may lie under one that others may not enter.
  launch munged munged -F --force --key-file="$dir/etc/munge.key" --socket="$dir/run/munge.sock" \
    --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/run/munged.seed"
  until_true 30 test -S "$dir/run/munge.sock" || die 1 "munged did not start: $(tail -n 3 "$dir/log/munged.out")"
  launch slurmctld slurmctld -D
  until_true 60 is_up || die 1 "slurmctld did not start: $(tail -n 3 "$dir/log/slurmctld.out")"
  for ((i = 1; i <= NODES; i++)); do
    # shellcheck disable=SC2016  # the inner shell expands them
    launch "slurmd.node$i" unshare --uts --mount --propagation slave sh -c \
      'hostname "$1" && mount --bind "$2" /etc/hosts && exec slurmd -D -N "$1"' sh "node$i" "$dir/etc/hosts"
  done
  until_true 60 all_idle || die 1 "the nodes did not become idle: $(tail -n 3 "$dir/log/slurmd.node1.out")"
}

left_over() { # step daemons and processes of jobs that outlived this cluster
  local process
  for process in /proc/[0-9]*; do
    if grep -qzxF "SLURM_CONF=$dir/etc/slurm.conf" "$process/environ" 2>/dev/null &&
      grep -qz "^SLURM_JOB_ID=" "$process/environ" 2>/dev/null; then
      echo "${process#/proc/}"
    elif [[ $(cat "$process/comm" 2>/dev/null) == slurmstepd* ]] &&
      readlink "$process"/fd/* 2>/dev/null | grep -q "^$dir/log/"; then
      echo "${process#/proc/}"
    fi
  done
}

down() {
  local pid
  [[ -r $dir/pids ]] || return 0
  export SLURM_CONF=$dir/etc/slurm.conf
  timeout 10 squeue -h -o %A 2>/dev/null | sort -u | xargs -r timeout 10 scancel -s KILL -f 2>/dev/null
  timeout 10 squeue -h -o %A 2>/dev/null | sort -u | xargs -r timeout 10 scancel 2>/dev/null
  until_true 20 no_jobs || echo "cluster.sh: some jobs did not end" >&2
  tac "$dir/pids" | while read -r pid; do kill -TERM "$pid" 2>/dev/null; done
  sleep 1
  for pid in $(left_over) $(<"$dir/pids"); do kill -KILL "$pid" 2>/dev/null; done
  rm -f "$dir/pids"
}

[[ $# == 2 && $1 =~ ^(up|down)$ ]] || die 2 "usage: cluster.sh up|down DIR"
dir=$(realpath -m -- "$2")
[[ $dir =~ ^[A-Za-z0-9_./+-]+$ && ${#dir} -le 70 ]] || die 3 "the folder must be short and without odd characters: $dir"
"$1"
