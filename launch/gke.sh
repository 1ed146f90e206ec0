#!/usr/bin/env bash
# Runs a command on a TPU slice of a GKE cluster, as a JobSet.
#
#   launch/gke.sh ACTION --name=NAME [OPTIONS] [-- python -m agrpo_jax.main ...]
#
# Actions:
#   submit    start the command, on every host of the slice
#   manifest  print the JobSet that submit applies, to keep or to change
#   logs      of host 0, until it ends
#   status    of the JobSet and its pods
#   delete    the JobSet; the cluster's nodes stay
#
# Options:
#   --topology=v6e:4x4        slice, as in agrpo_jax.plan: v4, v5e, v5p, v6e, tpu7x
#   --image=IMAGE             built from launch/Dockerfile
#   --bucket=NAME             mounted as /bucket
#   --service-account=default Kubernetes account that may use the bucket
#   --namespace=default
#   --max-restarts=100        after preemptions and crashes; none after a mistake
#                             in the settings (exit code 2) or NaN (exit code 3)
#   --spot                    ask for spot nodes
#   --tool=kubectl            or xpk, which needs --cluster, --zone and --project
#                             and takes spot nodes and buckets from the cluster
#   --dry-run                 print the commands instead of running them

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"

name='' topology='' image='' bucket='' service_account=default namespace=default
max_restarts=100 spot=false tool=kubectl cluster='' zone='' project=''
parse "submit manifest logs status delete" \
  "name topology image bucket service-account namespace max-restarts tool\
 cluster zone project" "spot" "$@"

n='[1-9][0-9]*'
label='[a-z]([-a-z0-9]{0,38}[a-z0-9])?'
label_meaning="a name of at most 40 lowercase letters, digits and hyphens"
expect name "$label" "$label_meaning"
expect namespace "$label" "$label_meaning"
expect tool 'kubectl|xpk' "kubectl or xpk"
if [[ $tool == xpk ]]; then
  expect cluster "$label" "$label_meaning"
  expect zone '[a-z]+-[a-z]+[0-9]+(-[a-z])?' "a zone such as europe-west4-a"
  expect project '[a-z][-a-z0-9.:]{4,}[a-z0-9]' "a project id"
  if [[ $action == manifest ]]; then problem "xpk writes its own manifest"; fi
  if $spot; then problem "with xpk, spot is a property of the cluster"; fi
  if [[ -n $bucket ]]; then
    problem "with xpk, a bucket is attached once: xpk storage attach --help"
  fi
fi
case $action in
  submit | manifest)
    expect topology "(v5e|v6e):${n}x$n|(v4|v5p|tpu7x):${n}x${n}x$n" \
      "a slice such as v6e:4x4, v5e:4x8 or v5p:2x2x1"
    expect image '[^[:space:]]+' "a container image"
    expect service-account "$label" "$label_meaning"
    expect max-restarts '[0-9]+' "a number of restarts"
    if [[ -n $bucket ]]; then
      expect bucket '[a-z0-9][-a-z0-9_.]+[a-z0-9]' "a bucket's name without gs://"
    fi
    expect_command
    if [[ ${words[*]-} == *[[:cntrl:]]* ]]; then
      problem "the command has a line break or another control character"
    fi
    ;;
  *) ((${#words[@]} == 0)) || problem "$action takes no command" ;;
esac
check

# What the cloud calls the slice, and how many hosts it has.
slice() {
  local generation=${topology%%:*}
  shape=${topology#*:}
  chips=$((${shape//x/*}))
  # Hosts have 4 chips, but one host serves a whole 2x4 of v5e or v6e.
  chips_per_host=$((chips < 4 ? chips : 4))
  if [[ $generation == v[56]e && $shape == 2x4 ]]; then chips_per_host=8; fi
  if ((chips % chips_per_host)); then
    stop 2 "--topology=$topology has $chips chips; a host has $chips_per_host."
  fi
  hosts=$((chips / chips_per_host))
  # Types of v4 and v5p count cores, two per chip.
  case $generation in
    v5e) accelerator=tpu-v5-lite-podslice tpu_type=v5litepod-$chips ;;
    v6e) accelerator=tpu-v6e-slice tpu_type=v6e-$chips ;;
    v5p) accelerator=tpu-v5p-slice tpu_type=v5p-$((2 * chips)) ;;
    v4) accelerator=tpu-v4-podslice tpu_type=v4-$((2 * chips)) ;;
    tpu7x) accelerator=tpu7x tpu_type=tpu7x-$shape ;;
  esac
}

# Words as a YAML flow sequence; a JSON string is a YAML one. Kubernetes would
# read $(x) as a variable.
yaml_list() {
  local word separator=''
  for word in "$@"; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    word=${word//\$(/\$\$(}
    printf '%s"%s"' "$separator" "$word"
    separator=', '
  done
}

manifest() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  namespace: $namespace
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $max_restarts
    rules:
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: 1
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: main
                  operator: In
                  values: [2, 3]
          template:
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
                gke-gcsfuse/ephemeral-storage-limit: "0"
            spec:
              restartPolicy: Never
              serviceAccountName: $service_account
              terminationGracePeriodSeconds: 300
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $shape
YAML
  if $spot; then
    echo '                cloud.google.com/gke-spot: "true"'
  fi
  cat <<YAML
              containers:
                - name: main
                  image: "$image"
                  command: [$(yaml_list "${words[@]}")]
                  env:
                    - name: AGRPO_DISTRIBUTED
                      value: auto
                  ports:
                    - containerPort: 8471
                    - containerPort: 8482
                  resources:
                    limits:
                      google.com/tpu: $chips_per_host
YAML
  if [[ -n $bucket ]]; then
    cat <<YAML
                  volumeMounts:
                    - name: bucket
                      mountPath: /bucket
              volumes:
                - name: bucket
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes:
                      bucketName: $bucket
                      # No caches: hosts have to see what others wrote.
                      mountOptions: "implicit-dirs,\
metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0,\
file-system:kernel-list-cache-ttl-secs:0"
YAML
  fi
}

submit_kubectl() {
  local code=0
  show kubectl apply --filename=- >&2
  manifest | kubectl apply --filename=- || code=$?
  ((code == 0)) || stop "$code" "submitting failed (exit code $code)."
}

case $action in
  manifest) slice ;;
  submit)
    slice
    need "$tool"
    ;;
  logs) need kubectl ;;
  *) need "$tool" ;;
esac

place=(--cluster="$cluster" --zone="$zone" --project="$project")
selector=jobset.sigs.k8s.io/jobset-name=$name
host_0=$selector,batch.kubernetes.io/job-completion-index=0
case $action-$tool in
  manifest-*) manifest ;;
  submit-kubectl)
    if $dry_run; then
      echo "kubectl apply --filename=- <<'YAML'"
      manifest
      echo YAML
    else
      submit_kubectl
    fi
    ;;
  submit-xpk)
    run "submitting" xpk workload create --workload="$name" "${place[@]}" \
      --tpu-type="$tpu_type" --num-slices=1 --docker-image="$image" \
      --max-restarts="$max_restarts" \
      --command="$(quoted env AGRPO_DISTRIBUTED=auto "${words[@]}")"
    ;;
  status-kubectl)
    run "asking for the JobSet" kubectl get jobset "$name" \
      --namespace="$namespace"
    run "asking for its pods" kubectl get pods --namespace="$namespace" \
      --selector="$selector" --output=wide
    ;;
  status-xpk) run "asking for the state" xpk workload list "${place[@]}" ;;
  logs-*)
    run "following the output" kubectl logs --namespace="$namespace" \
      --selector="$host_0" --all-containers --tail=-1 --follow
    ;;
  delete-kubectl)
    run "deleting" kubectl delete jobset "$name" --namespace="$namespace"
    ;;
  delete-xpk)
    run "deleting" xpk workload delete --workload="$name" "${place[@]}"
    ;;
esac
