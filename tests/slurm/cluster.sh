#!/usr/bin/env bash
# A Slurm of two nodes, n1 and n2, on this machine, for trying what examples/slurm does. Needs root, and Debian's packages
# slurm-wlm and munge (22.05 was used); it touches no Slurm that is installed.
#
#   cluster.sh up DIR            two network namespaces, munge, slurmctld, two slurmd; everything under DIR
#   cluster.sh host n1 DIR CMD   run CMD as on that node: own network, host name, /etc/hosts, /tmp/ray
#   cluster.sh down DIR

set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
namespace() { echo "msppo-$1"; }

up() {
  local dir=$1
  mkdir -p "$dir"/{ctld,log,spool.n1,spool.n2,munge}
  sed "s|@DIR@|$dir|" "$here/slurm.conf" > "$dir/slurm.conf"
  printf 'NodeName=n1 Name=gpu File=/dev/null\nNodeName=n2 Name=gpu File=/dev/zero\n' > "$dir/gres.conf"
  printf '127.0.0.1 localhost\n10.77.0.1 n1\n10.77.0.2 n2\n' > "$dir/hosts"
  ip link add msppo1 type veth peer name msppo2
  for number in 1 2; do
    ip netns add "$(namespace n$number)"
    ip link set "msppo$number" netns "$(namespace n$number)"
    ip -n "$(namespace n$number)" addr add "10.77.0.$number/24" dev "msppo$number"
    ip -n "$(namespace n$number)" link set "msppo$number" up
    ip -n "$(namespace n$number)" link set lo up
  done
  head -c 1024 /dev/urandom > "$dir/munge/key"
  chmod 700 "$dir/munge" && chmod 400 "$dir/munge/key"
  chmod go-w "$dir"
  munged --key-file "$dir/munge/key" --socket "$dir/munge.sock" --pid-file "$dir/munge.pid" \
    --log-file "$dir/munge/log" --seed-file "$dir/munge/seed" --force
  host n1 "$dir" slurmctld -f "$dir/slurm.conf"
  host n1 "$dir" slurmd -N n1 -f "$dir/slurm.conf"
  host n2 "$dir" slurmd -N n2 -f "$dir/slurm.conf"
  for _ in $(seq 30); do
    [[ $(host n1 "$dir" sinfo -h -o %T -p low) == idle ]] && return
    sleep 1
  done
  host n1 "$dir" sinfo >&2
  return 1
}

host() {
  local name=$1 dir=$2
  shift 2
  mkdir -p "$dir/ray.$name" /tmp/ray
  # `ip netns exec` would hide /sys/fs/cgroup.
  SLURM_CONF=$dir/slurm.conf exec_on "$name" "$dir" "$@"
}

exec_on() {
  local name=$1 dir=$2
  shift 2
  nsenter --net="/run/netns/$(namespace "$name")" unshare --uts --mount bash -c \
    'hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount --bind "$2/ray.$1" /tmp/ray; shift 2; exec "$@"' _ "$name" "$dir" "$@"
}

down() {
  local dir=$1
  host n1 "$dir" scancel --state=RUNNING -p low || true
  sleep 2
  for file in d.n1 d.n2 ctld munge; do
    [[ ! -e $dir/$file.pid ]] || kill "$(cat "$dir/$file.pid")" || true
  done
  ip netns del "$(namespace n1)" || true
  ip netns del "$(namespace n2)" || true
}

command=$1
shift
"$command" "$@"
