#!/usr/bin/env bash
# Trains with several processes on this machine.
#
#   launch/local.sh [option ...] -- --config=configs/digits.py --workdir=DIR [--config.knob=value ...]
#
# What follows -- goes to every `python -m ekd_jax.main`. Process 0 talks on this terminal, the others only
# report errors. SIGINT and SIGTERM are passed on: the run saves and ends. Run it again to go on.
#
#   --processes=2   how many
#   --devices=1     virtual CPU devices of each
#   --gpus          process i has GPU i instead
#   --port=N        where process 0 listens for the others; if not given, a free one
#   --grace=30      seconds that the others have to end, if one fails
#   --dry_run       print the commands, run nothing

set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

processes=2 devices='' gpus='' port='' grace=30
parse 'processes devices port grace' 'gpus' "$@"
[[ -z $gpus || -z $devices ]] || fail "--devices are of the CPU: leave it out with --gpus"
devices=${devices:-1}
natural processes devices grace
of_program config >/dev/null
of_program workdir >/dev/null

if [[ -z $port ]]; then # one where nobody answers
  port=$((20000 + RANDOM % 10000))
  while (: <>"/dev/tcp/localhost/$port") 2>/dev/null; do port=$((port + 1)); done
fi
natural port

pids=() told='' # the signal that came to this script
# shellcheck disable=SC2329
pass_on() {
  told=$1
  kill "-$1" "${pids[@]}" 2>/dev/null || true
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM HUP

set -m # a process group for each: Ctrl-C comes to this script alone, and is passed on once
for ((i = 0; i < processes; i++)); do
  [[ -z $told ]] || break
  if [[ -n $gpus ]]; then
    settings=("CUDA_VISIBLE_DEVICES=$i")
  else
    # the CPU's other scheduler may start all-reduces in another order on each device, and so hang
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
    [[ -z $told ]] || continue
    deadline=$((SECONDS + grace))
    # 130 and 143: they all agreed to save and end, and a second signal would cut that short.
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
