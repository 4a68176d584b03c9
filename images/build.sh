#!/usr/bin/env bash
# Build both images with docker, podman or buildah. ENGINE chooses; REGISTRY and TAG name them; ARGS is handed on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

registry=${REGISTRY:-registry.example.com}
tag=${TAG:-dev}

fail() {
  printf 'images: %s\n' "$*" >&2
  exit 1
}

# The first engine that not only is installed, but answers.
find_engine() {
  local name found=()
  for name in ${ENGINE:-docker podman buildah}; do
    command -v "$name" >/dev/null || continue
    found+=("$name")
    if "$name" info >/dev/null 2>&1; then
      printf '%s\n' "$name"
      return
    fi
  done
  if ((${#found[@]})); then
    fail "${found[*]} is installed but does not answer: try \`${found[0]} info\`"
  fi
  fail "none of ${ENGINE:-docker, podman, buildah} is installed: one of them has to build the images"
}

engine=$(find_engine)
for name in control submission; do
  image=$registry/orchestrator$([[ $name == control ]] || echo "-$name"):$tag
  echo "images: building $image with $engine"
  # shellcheck disable=SC2086 # several arguments
  "$engine" build ${ARGS:-} --file "images/$name.Dockerfile" --tag "$image" .
done
