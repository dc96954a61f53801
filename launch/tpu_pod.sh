#!/usr/bin/env bash
# Train on a Cloud TPU pod: create it, install ekd_jax on its workers, start the program and follow its log.
#
#   launch/tpu_pod.sh --name=my-pod --zone=us-east5-b --accelerator_type=v6e-16 --version=v2-alpha-tpuv6e \
#     --bucket=my-bucket -- --config=configs/resnet_imagenet.py --workdir=/shared/runs/imagenet
#   launch/tpu_pod.sh --name=my-pod --zone=us-east5-b --delete
#
# Everything after -- is passed to `python -m ekd_jax.main` on every worker. The program continues if this
# terminal closes. The same command can be repeated at any time: it skips steps that are done, follows a program
# that runs, and creates a preempted pod again and resumes the run there. A pod costs money until it is deleted.
#
#   --name=NAME              name of the pod
#   --zone=ZONE              its zone
#   --project=PROJECT        its project; default: gcloud's
#   --accelerator_type=TYPE  v6e-16, v5litepod-16, v4-32, ...
#   --version=VERSION        software version: v2-alpha-tpuv6e, v2-alpha-tpuv5, v2-alpha-tpuv5-lite (v5e),
#                            tpu-ubuntu2204-base (v4 and older)
#   --spot                   cheaper, but can be preempted
#   --queue                  wait for capacity (as a queued resource) instead of failing
#   --source=URL|DIR         source of ekd_jax: a git repository, installed once, or a directory, installed
#                            again when its files change; default: the directory above this script
#   --bucket=BUCKET          bucket to mount at /shared on every worker; --workdir must be below /shared
#   --poll=30                seconds between two checks while waiting
#   --delete                 let the program save, then delete the pod
#   --dry_run                print the commands for a pod that does not exist yet; run nothing

set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

name='' zone='' project='' accelerator_type='' version='' spot='' queue='' bucket='' poll=30 delete=''
source=$(cd "$(dirname "$0")/.." && pwd)
parse 'name zone project accelerator_type version source bucket poll' 'spot queue delete' "$@"
required name zone
where=("--zone=$zone" ${project:+"--project=$project"})

# --- the pod -------------------------------------------------------------------------------------

look_up() { # tpu-vm|queued-resources FIELD: set $found to its value, or to absent
  local errors query=(gcloud compute tpus "$1" describe "$name" "${where[@]}" "--format=value($2)")
  if [[ -n $dry_run ]]; then
    quoted "${query[@]}"
    found=absent
    return
  fi
  errors=$(mktemp)
  if ! found=$("${query[@]}" 2>"$errors"); then
    grep -q NOT_FOUND "$errors" || fail "gcloud cannot describe $name: $(tail -n 1 "$errors")" 1
    found=absent
  fi
  rm -f "$errors"
}

create_pod() {
  say "creating $name ($accelerator_type in $zone)"
  if [[ -n $queue ]]; then
    step "request $name as a queued resource" \
      gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${where[@]}" \
      "--accelerator-type=$accelerator_type" "--runtime-version=$version" ${spot:+--spot}
  else
    step "create $name (if there is no capacity, --queue waits for it)" \
      gcloud compute tpus tpu-vm create "$name" "${where[@]}" \
      "--accelerator-type=$accelerator_type" "--version=$version" ${spot:+--spot}
  fi
}

delete_pod() {
  look_up queued-resources state.state
  if [[ $found != absent || -n $dry_run ]]; then
    say "deleting the queued resource $name and its pod"
    step "delete $name: IT MAY STILL COST MONEY" \
      gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  fi
  look_up tpu-vm state
  if [[ $found != absent || -n $dry_run ]]; then
    say "deleting the pod $name"
    step "delete $name: IT MAY STILL COST MONEY" \
      gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
  fi
}

ready_pod() { # create the pod if necessary and wait until it is ready
  local state
  while true; do
    look_up tpu-vm state
    state=$found
    if [[ $state == absent ]]; then
      look_up queued-resources state.state
      [[ $found == absent ]] || state="queue: $found"
    fi
    case $state in
      READY) return ;;
      absent) create_pod ;;
      PREEMPTED | TERMINATED | 'queue: SUSPENDED')
        say "$name was preempted ($state)"
        delete_pod
        ;;
      STOPPED) step "start $name" gcloud compute tpus tpu-vm start "$name" "${where[@]}" ;;
      'queue: FAILED')
        fail "the queued resource $name failed: see gcloud compute tpus queued-resources describe $name" 1
        ;;
      *)
        say "waiting for $name ($state)"
        sleep "$poll"
        ;;
    esac
    [[ -z $dry_run ]] || return 0
  done
}

# --- run on the workers: sent as text, so no function may use another one ------------------------

look() { # ID: print whether the program runs and whether this source is installed
  if pgrep -F ~/ekd_jax.pid -f ekd_jax.main >/dev/null 2>&1; then echo running; fi
  if [[ $(cat ~/ekd_jax/.installed 2>/dev/null) == "$1" ]]; then echo installed; else echo missing; fi
}

install() { # ID SOURCE: into ~/ekd_jax, with a separate Python, because the system's may be too old for JAX
  set -e
  cd ~
  rm -rf ekd_jax
  if [[ -n $2 ]]; then
    git clone --quiet --depth=1 "$2" ekd_jax
  else
    mkdir ekd_jax
    tar -xzf ekd_jax.tar.gz -C ekd_jax
  fi
  PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  cd ekd_jax
  uv venv --quiet --python=3.12 .venv
  uv pip install --quiet --python=.venv/bin/python -e '.[imagenet,gcs]' 'jax[tpu]'
  echo "$1" >.installed
}

share() { # BUCKET: mount it at /shared without caches: workers must see each other's files at once
  set -e
  if mountpoint -q /shared; then return; fi
  if ! command -v gcsfuse >/dev/null; then
    curl -LsSf https://packages.cloud.google.com/apt/doc/apt-key.gpg |
      sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
    echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt" \
      "gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y gcsfuse
  fi
  sudo mkdir -p /shared
  sudo chown "$(id -u)" /shared
  gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 "$1" /shared
}

start() { # OPTION...: start the program in its own session, so that it survives the end of the connection
  cd ~/ekd_jax || return
  if pgrep -F ~/ekd_jax.pid -f ekd_jax.main >/dev/null 2>&1; then return; fi
  rm -f ~/ekd_jax.code
  # shellcheck disable=SC2016
  setsid bash -c 'trap : TERM; .venv/bin/python -m ekd_jax.main "$@"; echo $? >~/ekd_jax.code' \
    ekd_jax.main "$@" >>~/ekd_jax.log 2>&1 </dev/null &
  echo $! >~/ekd_jax.pid
}

follow() { # print the log until the program ends; exit with its code
  tail -n 100 -f --pid="$(cat ~/ekd_jax.pid)" ~/ekd_jax.log
  exit "$(cat ~/ekd_jax.code || echo 1)"
}

last_lines() { # print the end of this worker's log
  echo "--- $(hostname)"
  tail -n 3 ~/ekd_jax.log
}

stop() { # tell the program to save and end, and wait up to two minutes
  if pkill -TERM -P "$(cat ~/ekd_jax.pid 2>/dev/null)" 2>/dev/null; then
    timeout 120 tail -f --pid="$(cat ~/ekd_jax.pid)" /dev/null
  fi
}

on_workers() { # all|NUMBER FUNCTION ARGUMENT...: run a function on all workers or on one
  local workers=$1
  shift
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$workers" \
    "--command=$(declare -f "$1"); $(quoted "$@")"
}

# --- create, install, start, follow --------------------------------------------------------------

if [[ -n $delete ]]; then
  look_up tpu-vm state
  if [[ $found == READY || -n $dry_run ]]; then
    say "telling the program to save"
    on_workers 0 stop || say "worker 0 could not be reached"
  fi
  delete_pod
  say "$name in $zone is deleted"
  exit
fi

required accelerator_type version source
seconds poll
program_option config >/dev/null
workdir=$(program_option workdir)
[[ -z $bucket || $workdir == /shared/?* ]] || fail "--workdir=$workdir must be below /shared, the bucket"
[[ $workdir != gs://* ]] || fail "--workdir=$workdir must be a directory: mount the bucket with --bucket"

# Names that are not copied with a directory.
skip=(.git .venv .mypy_cache .ruff_cache .pytest_cache .benchmarks __pycache__ '*.egg-info' runs students)
if [[ -d $source ]]; then
  unwanted=()
  for word in "${skip[@]}"; do unwanted+=(-name "$word" -prune -o); done
  id=$(cd "$source" && find . "${unwanted[@]}" -type f -exec cksum {} + | sort | cksum)
elif [[ $source == *:* ]]; then
  id=$source
else
  fail "--source=$source is neither a directory nor a URL"
fi

reminder="$name costs money until it is deleted: $0 --name=$name ${where[*]} --delete"
trap 'say "$reminder"' EXIT

lost=0 # times that the program ended because a process was lost
while true; do
  ready_pod
  seen=$(on_workers all look "$id") || fail "cannot inspect the workers of $name, see above" $?
  [[ -z $dry_run ]] || { echo "$seen" && seen=missing; }
  if [[ $seen == *running* ]]; then
    say "the program is already running, with the options it was started with"
  else
    if [[ $seen == *missing* ]]; then
      say "installing ekd_jax"
      url=$source
      if [[ -d $source ]]; then
        url='' archive=${TMPDIR:-/tmp}/ekd_jax.$name.tar.gz
        step "pack $source" tar -czf "$archive" "${skip[@]/#/--exclude=}" -C "$source" .
        step "copy $source" gcloud compute tpus tpu-vm scp "$archive" "$name:ekd_jax.tar.gz" \
          "${where[@]}" --worker=all
        run rm -f "$archive"
      fi
      step "install ekd_jax" on_workers all install "$id" "$url"
    fi
    [[ -z $bucket ]] || step "mount $bucket" on_workers all share "$bucket"
    say "starting the program"
    step "start the program" on_workers all start "${program[@]}"
  fi

  say "following ~/ekd_jax.log of worker 0; the program continues if this terminal closes"
  code=0
  on_workers 0 follow || code=$?
  [[ -z $dry_run ]] || exit 0
  if ((code == 0)); then
    say "complete: $workdir"
    exit
  elif ((code == 143 || code == 255 || code == 75)); then # stopped, or a connection was lost: was the pod preempted?
    sleep "$poll"
    look_up tpu-vm state
    if [[ $found != READY ]] || ((code == 255)); then continue; fi
    if ((code == 75 && lost++ < 10)); then
      say "a process was lost: starting the program again, which resumes from its latest checkpoint"
      continue
    fi
    ((code == 143)) || fail "a process was lost again and again" "$code"
    fail "the program was told to end and saved; the same command resumes the run" 143
  fi
  on_workers all last_lines || true
  fail "the program exited with code $code" "$code"
done
