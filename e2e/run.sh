#!/usr/bin/env bash
# `make e2e`: images, cluster, suite, clean-up; says what it does, and how long each phase took.
#
#   E2E_NODE_IMAGE   node image of kind; by default kind's own
#   E2E_KUBECONFIG   use this cluster instead of kind; the images must be there or be pullable
#   E2E_SKIP_BUILD=1 take the images as they are
#   E2E_OUT          folder of logs and events of failures; default build/e2e
#   E2E_KEEP=1       keep the cluster and what the suite made; the next run can take both up
# Further options are pytest's.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
BUILDER=${BUILDER:?which of docker, podman and buildah; make e2e sets it}
CLUSTER=alise-e2e
export E2E_OUT=${E2E_OUT:-$PWD/build/e2e}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
work=$(mktemp -d)
times=()

phase() { # phase NAME COMMAND...
  local name=$1 start=$SECONDS
  shift
  echo "== $name"
  local code=0
  "$@" || code=$?
  times+=("$name: $((SECONDS - start)) s")
  return "$code"
}

clean_up() {
  local code=$?
  if [[ -z ${E2E_KUBECONFIG:-} && -z ${E2E_KEEP:-} ]]; then
    phase "delete the cluster" kind delete cluster --name "$CLUSTER" || true
  fi
  rm -rf "$work"
  echo "== phases"
  printf '%s\n' "${times[@]}"
  [[ $code == 0 ]] || echo "failed; logs and events, if any: $E2E_OUT/failures"
  exit "$code"
}

load() {
  local name archive workers
  workers=$(kind get nodes --name "$CLUSTER" | grep -v control-plane | paste -sd,)
  for name in operator sidecar engine-cpu; do
    archive=$work/$name.tar
    case $BUILDER in
      *buildah) buildah push --quiet "alise/$name:$version" "docker-archive:$archive:alise/$name:$version" ;;
      # podman calls what it builds localhost/...; the archive has the name that the chart has.
      *podman) podman save -q -o "$archive" "localhost/alise/$name:$version" ;;
      *) docker save -o "$archive" "alise/$name:$version" ;;
    esac
    kind load image-archive "$archive" --name "$CLUSTER" --nodes "$workers"
    rm "$archive"
  done
}

simulate_gpus() { # no device behind it: scheduled and accounted for as usual
  local node
  for node in $(kubectl get nodes -l nvidia.com/gpu.present=true -o name); do
    kubectl patch "$node" --subresource=status --type=json \
      -p '[{"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": "2"}]'
  done
}

trap clean_up EXIT
[[ -n ${E2E_SKIP_BUILD:-} ]] || phase "build the images" make --no-print-directory images
if [[ -n ${E2E_KUBECONFIG:-} ]]; then
  export KUBECONFIG=$E2E_KUBECONFIG
else
  export KUBECONFIG=$work/kubeconfig
  if kind get clusters | grep -qx "$CLUSTER"; then
    kind export kubeconfig --name "$CLUSTER"
  else
    phase "kind cluster" kind create cluster --name "$CLUSTER" --config e2e/kind.yaml --wait 180s \
      ${E2E_NODE_IMAGE:+--image "$E2E_NODE_IMAGE"}
  fi
  phase "simulated GPUs" simulate_gpus
  phase "load the images" load
fi
phase "suite" "$PYTHON" -m pytest e2e -s -v --durations=0 "$@"
