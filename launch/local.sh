#!/usr/bin/env bash
# Train with several processes on this machine.
#
#   launch/local.sh [option ...] -- --config=configs/digits.py --workdir=DIR [--config.knob=value ...]
#
# Everything after -- is passed to `python -m ekd_jax.main` in every process. Process 0 prints to this terminal,
# the others print only errors. SIGINT and SIGTERM are passed on: the run saves and ends. The same command
# resumes it.
#
#   --processes=2   number of processes
#   --devices=1     virtual CPU devices per process
#   --gpus          use one GPU per process instead: process i gets GPU i
#   --port=N        port on which process 0 listens; default: a free one
#   --grace=30      seconds that the other processes have to end after one has failed
#   --dry_run       print the commands, but do not run them

set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

processes=2 devices='' gpus='' port='' grace=30
parse 'processes devices port grace' 'gpus' "$@"
[[ -z $gpus || -z $devices ]] || fail "--devices sets virtual CPU devices: omit it with --gpus"
devices=${devices:-1}
positive processes devices grace
program_option config >/dev/null
program_option workdir >/dev/null

if [[ -z $port ]]; then # search for one on which nothing listens
  port=$((20000 + RANDOM % 10000))
  while (: <>"/dev/tcp/localhost/$port") 2>/dev/null; do port=$((port + 1)); done
fi
positive port

pids=() received='' # the signal that this script received
# shellcheck disable=SC2329
pass_on() {
  received=$1
  kill "-$1" "${pids[@]}" 2>/dev/null || true
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM HUP

set -m # one process group per process, so that Ctrl-C reaches only this script, which passes it on once
for ((i = 0; i < processes; i++)); do
  [[ -z $received ]] || break
  if [[ -n $gpus ]]; then
    settings=("CUDA_VISIBLE_DEVICES=$i")
  else
    # With the concurrency-optimized scheduler, CPU devices may start all-reduces in different orders and hang.
    virtual="--xla_cpu_enable_concurrency_optimized_scheduler=false"
    virtual+=" --xla_force_host_platform_device_count=$devices"
    settings=(JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }$virtual")
  fi
  command=(env "${settings[@]}" python -m ekd_jax.main "${program[@]}"
    "--coordinator=localhost:$port" "--num_processes=$processes" "--process_id=$i")
  if [[ -n $dry_run ]]; then
    run "${command[@]}"
  elif ((i == 0)); then
    "${command[@]}" &
  else
    "${command[@]}" >/dev/null &
  fi
  [[ -n $dry_run ]] || pids+=($!)
done
set +m

code=0 deadline=''
while ((${#pids[@]})); do
  sleep 0.2 || true
  for i in "${!pids[@]}"; do
    ! kill -0 "${pids[i]}" 2>/dev/null || continue
    ended=0
    wait "${pids[i]}" || ended=$?
    unset "pids[i]"
    ((ended != 0 && code == 0)) || continue
    code=$ended
    [[ -z $received ]] || continue
    deadline=$((SECONDS + grace))
    # 130 and 143: all processes agreed to save and end; a second signal would interrupt that.
    if ((code != 130 && code != 143)); then
      say "process $i ended with code $code; ending the others"
      kill -TERM "${pids[@]}" 2>/dev/null || true
    fi
  done
  if [[ -n $deadline ]] && ((SECONDS > deadline)); then
    for pid in "${pids[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done
  fi
done
exit "$code"
