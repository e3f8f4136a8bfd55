#!/bin/sh
# Several Ray nodes on this one machine: jobs, Serve configs and the label selectors of the worker groups (values.yaml)
# find here what they find on Kubernetes.
#
#   sh cluster/local.sh up [WORKERS]     a head that takes no work, and WORKERS (2) nodes of two CPUs each
#   sh cluster/local.sh down
#
# `up` prints the line that makes `ray` and `serve` find it: eval "$(sh cluster/local.sh up)".
#
# Notable: it stops what it started and nothing else (`ray stop` stops every Ray of the machine). CPUs are Ray's count
# of what may run at once, so two nodes of two fit a laptop of two cores. RAYDR_LOCAL names another folder (a short
# name: Ray's sockets lie in it), RAYDR_LOCAL_PORT another first port.
set -eu

folder=${RAYDR_LOCAL:-/tmp/raydr-local}
port=${RAYDR_LOCAL_PORT:-6390}
dashboard=$((port + 1))
export RAY_AUTH_MODE=token  # one token for nodes and clients, in ~/.ray/auth_token
unset RAY_ADDRESS           # where a head is asked for, Ray refuses to be told of another one

# Each node has its own folder: in one for all, nodes unpack a job's files over one another, and a job now and then
# misses a module.
start() {
  name=$1
  shift
  setsid ray start --block --disable-usage-stats --temp-dir="$folder/$name" --object-store-memory=500000000 "$@" \
    >"$folder/$name.log" 2>&1 </dev/null &
  echo $! >"$folder/$name.pid"
}

# Until the node has joined, as long as it lives.
wait_for() {
  until grep -qs "Ray runtime started" "$folder/$1.log"; do
    kill -0 "$(cat "$folder/$1.pid")" 2>/dev/null || { cat "$folder/$1.log" >&2; exit 1; }
    sleep 0.2
  done
}

up() {
  [ ! -e "$folder" ] || { echo "$folder is there already: sh cluster/local.sh down" >&2; exit 1; }
  mkdir -p "$folder"
  [ -e "$HOME/.ray/auth_token" ] || ray get-auth-token --generate >/dev/null
  start head --head --port="$port" --dashboard-port="$dashboard" --num-cpus=0
  wait_for head
  for number in $(seq "$1"); do  # one after the other: all at once, a slow machine lets one give up
    start "worker-$number" --address="127.0.0.1:$port" --num-cpus=2 --labels=raydr/group=cpu
    wait_for "worker-$number"
  done
  echo "export RAY_AUTH_MODE=token RAY_ADDRESS=127.0.0.1:$port RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard"
}

# A node is a session of processes, and ends as one: asked politely, Ray waits half a minute for actors that stay.
down() {
  for file in "$folder"/*.pid; do
    [ ! -e "$file" ] || pkill -KILL -s "$(cat "$file")" || true
  done
  rm -rf "$folder"
}

case ${1:-} in
  up) up "${2:-2}" ;;
  down) down ;;
  *) sed -n 's/^#   sh/usage: sh/p' "$0" >&2; exit 2 ;;
esac
