#!/usr/bin/env bash
# Trains on Google Kubernetes Engine: fills in launch/jobset.yaml, applies it and follows the first pod.
#
#   launch/gke.sh --name=imagenet --accelerator_type=tpu-v6e-slice --topology=4x4 --source=URL \
#     --bucket=my-bucket -- --config=configs/resnet_imagenet.py --workdir=/shared/runs/imagenet
#   launch/gke.sh --name=imagenet --delete
#
# The cluster must have JobSet and such nodes; kubectl must be able to reach it. What follows -- goes to
# `python -m ekd_jax.main` in every pod. Pods that fail or are preempted are started again and go on. Run the
# same again at any time: a run that goes on is only followed, one that failed is applied anew.
#
#   --name=NAME              of the JobSet
#   --accelerator_type=TYPE  node label: tpu-v6e-slice, tpu-v5p-slice, ...; for GPUs nvidia-h100-80gb, ...
#   --topology=4x4           of the TPU slice, one pod a host
#   --hosts=N                for GPUs, instead of --topology: how many pods
#   --chips_per_host=4       TPU chips or GPUs of a pod
#   --source=URL             git repository of ekd_jax, installed in each pod before it starts
#   --image=python:3.12      the pods' image; --source may be left out if ekd_jax is in it
#   --bucket=BUCKET          mounted at /shared in every pod; --workdir must be below it
#   --claim=NAME             instead: a PersistentVolumeClaim that all pods may write, such as Filestore
#   --service_account=NAME   of Kubernetes, that may use the bucket; if not given, default
#   --spot                   on Spot nodes
#   --restarts=10            how often it is started again by itself
#   --poll=10                seconds between two looks at what is waited for
#   --delete                 delete the JobSet; its pods save first
#   --dry_run                print manifest and commands as they are if there is nothing yet; run nothing

# shellcheck disable=SC2034 # `manifest` reads variables by their names
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

name='' accelerator_type='' topology='' hosts='' chips_per_host=4 source='' image='' bucket='' claim=''
service_account=default spot='' restarts=10 poll=10 delete=''
parse "name accelerator_type topology hosts chips_per_host source image bucket claim service_account \
restarts poll" 'spot delete' "$@"
needed name

delete() {
  say "deleting the JobSet $name; its pods save first"
  run kubectl delete jobset "$name" --ignore-not-found --cascade=foreground
}

if [[ -n $delete ]]; then
  step "delete $name" delete
  say "there is no JobSet $name any more; its nodes cost money until the cluster, or you, remove them"
  exit
fi

# --- the manifest --------------------------------------------------------------------------------

needed accelerator_type
[[ -n $source || -n $image ]] || fail "--source=URL is missing, or an --image with ekd_jax in it"
image=${image:-python:3.12}
[[ -n $bucket || -n $claim ]] || fail "--bucket=... or --claim=... is missing: pods keep nothing"
[[ -z $bucket || -z $claim ]] || fail "--bucket and --claim: only one can be at /shared"
of_program config >/dev/null
workdir=$(of_program workdir)
[[ $workdir == /shared/?* ]] || fail "--workdir=$workdir must be below /shared"
natural chips_per_host restarts
seconds poll

# Pods of one run may start minutes apart, so each has patience with the others.
command="python -m ekd_jax.main --coordinator_timeout=1800 $(quoted "${program[@]}")"
jax='jax[tpu]' cases=tpu fuse=false
if [[ -n $topology ]]; then
  [[ -z $hosts ]] || fail "--hosts follows from --topology: leave it out"
  [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] || fail "--topology=$topology must be like 4x4 or 2x2x4"
  chips=$((${topology//x/*}))
  ((chips % chips_per_host == 0)) || fail "--topology=$topology: $chips chips are not hosts of $chips_per_host"
  hosts=$((chips / chips_per_host)) # JAX knows the hosts of a slice by what GKE tells the pods
else
  [[ -n $hosts ]] || fail "--topology=... is missing; for GPUs --hosts=..."
  natural hosts
  jax='jax[cuda13]' cases=gpu
  command+=" --coordinator=$name-host-0-0.$name:8476 --num_processes=$hosts"
  command+=" --process_id=\$JOB_COMPLETION_INDEX" # which Kubernetes sets
fi
[[ -z $bucket ]] || cases+='|bucket' fuse=true
[[ -z $claim ]] || cases+='|claim'
[[ -z $source ]] || cases+='|source'
[[ -z $spot ]] || cases+='|spot'

manifest() {
  local text key
  text=$(sed -E "s/ # ($cases)\$//; / # (tpu|gpu|bucket|claim|source|spot)\$/d" "$(dirname "$0")/jobset.yaml")
  for key in name accelerator_type topology hosts chips_per_host source image bucket claim service_account \
    restarts command jax fuse; do
    text=${text//"\${$key}"/"${!key}"}
  done
  echo "$text"
}

# --- in order ------------------------------------------------------------------------------------

look_up() { # $found: absent, Completed, Failed, or empty while it goes on
  local query=(kubectl get jobset "$name" --ignore-not-found
    '--output=jsonpath={.metadata.name} {.status.terminalState}')
  found=absent
  if [[ -n $dry_run ]]; then
    quoted "${query[@]}"
  else
    found=$("${query[@]}") || fail "kubectl cannot look up $name, see above" $?
    [[ -n $found ]] || found=absent
    found=${found#"$name "}
  fi
}

first_pod() { # its name and phase; the newest, if it was started again
  run kubectl get pods --sort-by=.metadata.creationTimestamp \
    "--selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0" \
    '--output=jsonpath={range .items[*]}{.metadata.name} {.status.phase}{"\n"}{end}' | tail -n 1
}

apply() {
  if [[ -z $dry_run ]]; then
    manifest | kubectl apply --filename=-
  else
    manifest
    quoted kubectl apply --filename=-
  fi
}

look_up
if [[ $found == Failed ]]; then
  say "$name failed before"
  step "delete $name" delete
  found=absent
fi
if [[ $found == absent ]]; then
  say "applying $name: $hosts pods"
  step "apply $name" apply
elif [[ $found == '' ]]; then
  say "$name goes on, with the options that it was started with"
fi
trap 'say "the JobSet $name costs money while it runs; to end it: $0 --name=$name --delete"' EXIT

followed='' waiting=''
while true; do
  look_up
  case $found in
    Completed)
      say "$name is complete"
      exit
      ;;
    Failed) fail "$name failed: kubectl describe jobset $name says why; run the same again to go on" 1 ;;
    absent) [[ -n $dry_run ]] || fail "$name was deleted" 1 ;;
  esac
  seen=$(first_pod) || fail "kubectl cannot list the pods of $name, see above" $?
  if [[ -n $dry_run ]]; then
    echo "$seen"
    quoted kubectl logs --follow POD --container=train
    exit
  fi
  read -r pod phase <<<"$seen"
  if [[ $phase == Running || ($phase =~ ^(Succeeded|Failed)$ && $pod != "$followed") ]]; then
    lines=-1 # all; a second time, after the connection broke, only the last
    [[ $pod != "$followed" ]] || lines=10
    say "the log of $pod; the run outlives this terminal"
    kubectl logs --follow "$pod" --container=train "--tail=$lines" || true
    followed=$pod
  elif [[ $seen != "$waiting" ]]; then
    say "waiting for the first pod: ${seen:-not made yet}"
    waiting=$seen
  fi
  sleep "$poll"
done
