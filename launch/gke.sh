#!/usr/bin/env bash
# Trains on a GKE cluster as a JobSet (https://jobset.sigs.k8s.io, which the cluster must have): writes the manifest, applies
# it, shows the first worker's output, and ends as the run does. The cluster starts all workers anew after a preemption or
# a lost node. Started again, it joins the run, or starts one that failed anew; either goes on where it stopped.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/gke.sh CONFIG WORKDIR --name NAME --image IMAGE --accelerator KIND [options] [--config.KEY=VALUE ...]
       launch/gke.sh --delete --name NAME
  CONFIG              a config's path in the image's working directory, such as configs/dit_imagenet.py:XL/2
  WORKDIR             gs://BUCKET/FOLDER, which every worker mounts under /gcs/BUCKET (Cloud Storage FUSE); or, with
                      --claim, a path under /shared. Overrides that name folders use these paths.
  --name NAME         of the JobSet
  --image IMAGE       in which this project is installed: `dit-jax` is on PATH
  --accelerator KIND  such as tpu-v5-lite-podslice or tpu-v6e-slice; or a GPU, such as nvidia-h100-80gb
  --topology T        of a TPU slice, such as 16x16
  --hosts N           workers of a slice, or GPU nodes (default: for TPUs, the topology's chips by those of a host)
  --chips N           of a host (default: 4 TPU chips, or 8 GPUs)
  --slices N          train on N such slices as one (default: 1)
  --claim CLAIM       mount this PersistentVolumeClaim (ReadWriteMany) under /shared
  --account NAME      Kubernetes service account that may read and write the bucket (default: default)
  --namespace NAME    default: kubectl's own
  --max-restarts N    after failures that are not the program's own (default: 100)
  --delete            delete the JobSet
  --dry-run           print every command and the manifest, run nothing
TEXT
}

POLL_SECONDS=${DIT_JAX_POLL_SECONDS:-15}
PORT=12355

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/arguments.sh
source launch/arguments.sh
name='' image='' accelerator='' topology='' hosts='' chips='' slices=1 claim='' account=default namespace='' max_restarts=100
options=(name image accelerator topology hosts chips slices claim account namespace max-restarts)
switches=(delete dry-run)
parse_arguments "$@"
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "--name=$name must be lower-case letters, digits and dashes"

where=()
if [[ -n $namespace ]]; then where=(--namespace "$namespace"); fi
for option in namespace image accelerator claim account; do
  [[ -z ${!option} ]] || require_plain "--$option" "${!option}"
done

require_program kubectl "see https://kubernetes.io/docs/tasks/tools"
# shellcheck disable=SC2154 # parse_arguments sets the switches
if $delete; then
  run kubectl delete jobset "$name" "${where[@]}" --ignore-not-found
  exit
fi

require_config_and_workdir
[[ -n $image && -n $accelerator ]] || fail "give --image and --accelerator; see --help"
for option in chips hosts slices max-restarts; do
  value=${option//-/_} value=${!value}
  [[ -z $value && $option =~ ^(chips|hosts)$ ]] || require_number "--$option" "$value"
done
if [[ $accelerator == tpu* ]]; then
  platform=tpu resource=google.com/tpu chips=${chips:-4}
  [[ $topology =~ ^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}$ ]] || fail "--topology=$topology must be such as 16x16"
  hosts=${hosts:-$((${topology//x/*} / chips))}
  ((hosts)) || fail "--chips=$chips must be at most those of --topology=$topology"
  selector="cloud.google.com/gke-tpu-accelerator: \"$accelerator\"
              cloud.google.com/gke-tpu-topology: \"$topology\""
else
  platform=gpu resource=nvidia.com/gpu chips=${chips:-8} hosts=${hosts:-1}
  selector="cloud.google.com/gke-accelerator: \"$accelerator\""
fi

bucket=''
case $workdir in
  gs://*/*)
    bucket=${workdir#gs://}
    workdir=/gcs/$bucket bucket=${bucket%%/*}
    require_plain "WORKDIR's bucket" "$bucket"
    ;;
  /shared/*) [[ -n $claim ]] || fail "WORKDIR=$workdir is on a claim; give --claim" ;;
  *) fail "WORKDIR=$workdir must be gs://BUCKET/FOLDER, or /shared/FOLDER with --claim" ;;
esac

# In a container's arguments Kubernetes puts the values of variables that it has, and makes one of two dollar signs.
for word in "$config" "$workdir" ${overrides[@]+"${overrides[@]}"}; do
  [[ ! $word =~ \$\$|\$\((JOB_INDEX|DIT_JAX_[A-Z_]*|LIBTPU_INIT_ARGS|XLA_FLAGS|KUBERNETES_[A-Z_]*)\) ]] ||
    fail "$word must not have ${BASH_REMATCH[0]} in it: Kubernetes would put something else in its place"
done

# In YAML, a JSON string is a string.
quote() {
  local text=$1 backslash=$'\\'
  text=${text//"$backslash"/"$backslash$backslash"}
  printf '"%s"\n' "${text//'"'/"$backslash"'"'}"
}

manifest() {
  local word annotations='' volumes='' mounts='' exclusive='' flags
  # shellcheck source=launch/xla_flags.sh
  flags=$(unset LIBTPU_INIT_ARGS XLA_FLAGS && source launch/xla_flags.sh "$platform" && echo "${LIBTPU_INIT_ARGS:-$XLA_FLAGS}")
  if [[ -n $bucket ]]; then
    annotations='
          metadata:
            annotations:
              gke-gcsfuse/volumes: "true"'
    mounts+="
                - name: bucket
                  mountPath: \"/gcs/$bucket\""
    volumes+="
              - name: bucket
                csi:
                  driver: gcsfuse.csi.storage.gke.io
                  volumeAttributes:
                    bucketName: \"$bucket\"
                    mountOptions: implicit-dirs,rename-dir-limit=100000"
  fi
  if [[ $platform == tpu ]]; then # each slice is a node pool, which takes no other
    exclusive='
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool'
  else # NCCL's processes share memory, of which a container has 64 MiB
    mounts+='
                - name: memory
                  mountPath: /dev/shm'
    volumes+='
              - name: memory
                emptyDir:
                  medium: Memory'
  fi
  if [[ -n $claim ]]; then
    mounts+="
                - name: shared
                  mountPath: /shared"
    volumes+="
              - name: shared
                persistentVolumeClaim:
                  claimName: \"$claim\""
  fi
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: "$name"$exclusive
spec:
  network:
    enableDNSHostnames: true
  failurePolicy:
    maxRestarts: $max_restarts
    rules:
    - name: mistakes
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: $slices
    template:
      spec:
        completionMode: Indexed
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        # 1 and 2 are the program's own errors, which would come again. All else, such as 75 (it asks to be started
        # again) or a lost node, starts all workers anew.
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: dit-jax
              operator: In
              values: [1, 2]
        template:$annotations
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
            serviceAccountName: "$account"
            nodeSelector:
              $selector
            tolerations:
            - key: $resource
              operator: Exists
              effect: NoSchedule
            containers:
            - name: dit-jax
              image: "$image"
              command: [bash, -c]
              # The workers are numbered through all slices; the first is where they meet.
              args:
              - >-
                DIT_JAX_PROCESS_ID=\$((JOB_INDEX * $hosts + JOB_COMPLETION_INDEX)) exec dit-jax "\$@"
              - dit-jax
              - train
              - $(quote "--config=$config")
              - $(quote "--workdir=$workdir")
$(for word in ${overrides[@]+"${overrides[@]}"}; do echo "              - $(quote "$word")"; done)
              env:
              - name: JOB_INDEX
                valueFrom:
                  fieldRef:
                    fieldPath: metadata.annotations['jobset.sigs.k8s.io/job-index']
              - name: DIT_JAX_COORDINATOR
                value: $name-slice-0-0.$name:$PORT
              - name: DIT_JAX_NUM_PROCESSES
                value: "$((slices * hosts))"
              - name: $([[ $platform == tpu ]] && echo LIBTPU_INIT_ARGS || echo XLA_FLAGS)
                value: $(quote "$flags")
              resources:
                limits:
                  $resource: $chips
              volumeMounts:$mounts
            volumes:$volumes
YAML
}

# Prints how the run ended, Completed or Failed; nothing while it goes on; "none" where there is none.
terminal_state() {
  local state
  [[ -n $(kubectl get jobset "$name" "${where[@]}" --ignore-not-found --output name) ]] || { echo none && return; }
  state=$(kubectl get jobset "$name" "${where[@]}" --output 'jsonpath={.status.terminalState}')
  echo "$state"
}

apply() {
  if $dry_run; then
    show kubectl apply "${where[@]}" --filename -
    manifest
  else
    manifest | kubectl apply "${where[@]}" --filename -
  fi
}

# Every restart makes new pods, so we ask for the first one's output again until the run has ended.
follow() {
  run kubectl logs "${where[@]}" --follow --tail=-1 --container dit-jax --selector \
    "jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
}

if $dry_run; then
  apply
  follow
  exit
fi

state=$(terminal_state)
case $state in
  none) apply ;;
  '') echo "joining the JobSet $name, which is under way" ;;
  *) # its workers are gone; the run resumes from its newest checkpoint
    kubectl delete jobset "$name" "${where[@]}"
    apply
    ;;
esac
while true; do
  follow || true # there are no pods yet, or they are gone
  state=$(terminal_state) || state=''
  case $state in
    Completed) echo "the JobSet $name is done; its record goes with launch/gke.sh --delete --name $name" && exit ;;
    Failed) fail "the JobSet $name failed; its last lines are above, and in kubectl logs --selector jobset.sigs.k8s.io/jobset-name=$name" ;;
    none) fail "the JobSet $name was deleted" ;;
  esac
  sleep "$POLL_SECONDS"
done
