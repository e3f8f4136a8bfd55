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

# Starts a node and waits until it has joined. Ray gives it half a minute, so on a busy machine it has three tries. Each
# node has its own folder: in one for all, they unpack a job's files over one another, and a job misses a module.
node() {
  name=$1
  shift
  for try in 1 2 3; do
    setsid ray start --block --disable-usage-stats --temp-dir="$folder/$name" --object-store-memory=500000000 "$@" \
      >"$folder/$name.log" 2>&1 </dev/null &
    pid=$!
    echo $pid >"$folder/$name.pid"
    while kill -0 $pid 2>/dev/null; do
      if grep -qs "Ray runtime started" "$folder/$name.log"; then return; fi
      sleep 0.2
    done
    pkill -KILL -s $pid || true  # what a node that gave up has left
  done
  cat "$folder/$name.log" >&2
  exit 1
}

up() {
  [ ! -e "$folder" ] || { echo "$folder is there already: sh cluster/local.sh down" >&2; exit 1; }
  mkdir -p "$folder"
  touch "$folder/.made-by-raydr"
  [ -e "$HOME/.ray/auth_token" ] || ray get-auth-token --generate >/dev/null
  node head --head --port="$port" --dashboard-port="$dashboard" --num-cpus=0
  for number in $(seq "$1"); do
    node "worker-$number" --address="127.0.0.1:$port" --num-cpus=2 --labels=raydr/group=cpu
  done
  echo "export RAY_AUTH_MODE=token RAY_ADDRESS=127.0.0.1:$port RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard"
}

# A node is a session of processes, and ends as one: asked politely, Ray waits half a minute for actors that stay.
# RAYDR_LOCAL may be a slip of the pen, so a folder that `up` did not make is not removed.
down() {
  [ -e "$folder" ] || return 0
  [ -e "$folder/.made-by-raydr" ] || { echo "$folder holds no nodes of this script; it is left alone" >&2; exit 1; }
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
