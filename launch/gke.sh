#!/usr/bin/env bash
# Train on Google Kubernetes Engine: fill in launch/jobset.yaml, apply it and follow the log of the first pod.
#
#   launch/gke.sh --name=imagenet --accelerator_type=tpu-v6e-slice --topology=4x4 --source=URL \
#     --bucket=my-bucket -- --config=configs/resnet_imagenet.py --workdir=/shared/runs/imagenet
#   launch/gke.sh --name=imagenet --delete
#
# The cluster must have JobSet and the requested nodes, and kubectl must reach it. Everything after -- is
# passed to `python -m ekd_jax.main` in every pod. If a pod fails or is preempted, all pods are restarted and
# resume the run. The same command can be repeated at any time: it follows a JobSet that runs, and replaces one
# that failed.
#
#   --name=NAME              name of the JobSet
#   --accelerator_type=TYPE  node label: tpu-v6e-slice, tpu-v5p-slice, ...; for GPUs nvidia-h100-80gb, ...
#   --topology=4x4           topology of the TPU slice, which determines the number of hosts; one pod per host
#   --hosts=N                for GPUs, instead of --topology: number of pods
#   --chips_per_host=4       TPU chips or GPUs per pod
#   --source=URL             git repository of ekd_jax, installed in each pod before it starts
#   --image=python:3.12      container image; --source can be omitted if ekd_jax is installed in it
#   --bucket=BUCKET          bucket to mount at /shared in every pod; --workdir must be below /shared
#   --claim=NAME             instead of --bucket: a PersistentVolumeClaim that all pods can write (Filestore)
#   --service_account=NAME   Kubernetes service account with access to the bucket; default: default
#   --spot                   use Spot nodes
#   --restarts=10            maximum number of automatic restarts
#   --poll=10                seconds between two checks while waiting
#   --delete                 delete the JobSet; its pods save first
#   --dry_run                print manifest and commands for a JobSet that does not exist yet; run nothing

# shellcheck disable=SC2034 # `manifest` reads variables by name
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

name='' accelerator_type='' topology='' hosts='' chips_per_host=4 source='' image='' bucket='' claim=''
service_account=default spot='' restarts=10 poll=10 delete=''
parse "name accelerator_type topology hosts chips_per_host source image bucket claim service_account \
restarts poll" 'spot delete' "$@"
required name

delete() {
  say "deleting JobSet $name; its pods save first"
  run kubectl delete jobset "$name" --ignore-not-found --cascade=foreground
}

if [[ -n $delete ]]; then
  step "delete $name" delete
  say "JobSet $name is deleted; its nodes cost money until they are removed, too"
  exit
fi

# --- the manifest --------------------------------------------------------------------------------

required accelerator_type
[[ -n $source || -n $image ]] || fail "--source=URL is missing, or --image=... with ekd_jax installed"
image=${image:-python:3.12}
[[ -n $bucket || -n $claim ]] || fail "--bucket=... or --claim=... is missing: the pods themselves keep nothing"
[[ -z $bucket || -z $claim ]] || fail "--bucket and --claim: only one can be mounted at /shared"
program_option config >/dev/null
workdir=$(program_option workdir)
[[ $workdir == /shared/?* ]] || fail "--workdir=$workdir must be below /shared"
positive chips_per_host restarts
seconds poll

# The pods of a run may start minutes apart.
command="python -m ekd_jax.main --coordinator_timeout=1800 $(quoted "${program[@]}")"
jax='jax[tpu]' cases=tpu fuse=false
if [[ -n $topology ]]; then
  [[ -z $hosts ]] || fail "--hosts follows from --topology: omit it"
  [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] || fail "--topology=$topology must look like 4x4 or 2x2x4"
  chips=$((${topology//x/*}))
  ((chips % chips_per_host == 0)) ||
    fail "--topology=$topology: $chips chips cannot be divided into hosts of $chips_per_host"
  hosts=$((chips / chips_per_host)) # GKE tells JAX the hosts of a TPU slice
else
  [[ -n $hosts ]] || fail "--topology=... is missing; for GPUs --hosts=..."
  positive hosts
  jax='jax[cuda13]' cases=gpu
  command+=" --coordinator=$name-host-0-0.$name:8476 --num_processes=$hosts"
  command+=" --process_id=\$JOB_COMPLETION_INDEX" # set by Kubernetes
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

# --- apply and follow ----------------------------------------------------------------------------

look_up() { # set $found: absent, Completed, Failed, or empty while the JobSet runs
  local query=(kubectl get jobset "$name" --ignore-not-found
    '--output=jsonpath={.metadata.name} {.status.terminalState}')
  found=absent
  if [[ -n $dry_run ]]; then
    quoted "${query[@]}"
  else
    found=$("${query[@]}") || fail "kubectl cannot get $name, see above" $?
    [[ -n $found ]] || found=absent
    found=${found#"$name "}
  fi
}

first_pod() { # print the name and phase of the first pod; of the newest one after restarts
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
  say "JobSet $name failed earlier"
  step "delete $name" delete
  found=absent
fi
if [[ $found == absent ]]; then
  say "applying $name: $hosts pods"
  step "apply $name" apply
elif [[ $found == '' ]]; then
  say "JobSet $name is running, with the options it was started with"
fi
trap 'say "JobSet $name costs money while it runs; to delete it: $0 --name=$name --delete"' EXIT

followed='' waiting=''
while true; do
  look_up
  case $found in
    Completed)
      say "JobSet $name is complete"
      exit
      ;;
    Failed) fail "JobSet $name failed: see kubectl describe jobset $name; the same command resumes the run" 1 ;;
    absent) [[ -n $dry_run ]] || fail "JobSet $name was deleted" 1 ;;
  esac
  seen=$(first_pod) || fail "kubectl cannot list the pods of $name, see above" $?
  if [[ -n $dry_run ]]; then
    echo "$seen"
    quoted kubectl logs --follow POD --container=train
    exit
  fi
  read -r pod phase <<<"$seen"
  if [[ $phase == Running || ($phase =~ ^(Succeeded|Failed)$ && $pod != "$followed") ]]; then
    lines=-1 # all lines; after a lost connection only the last ones
    [[ $pod != "$followed" ]] || lines=10
    say "following the log of $pod; the run continues if this terminal closes"
    kubectl logs --follow "$pod" --container=train "--tail=$lines" || true
    followed=$pod
  elif [[ $seen != "$waiting" ]]; then
    say "waiting for the first pod: ${seen:-not created yet}"
    waiting=$seen
  fi
  sleep "$poll"
done
