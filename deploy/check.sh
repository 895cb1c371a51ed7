#!/usr/bin/env bash
# Renders the manifests, checks them against the schemas of Kubernetes, and holds them to the rules of this project.
# usage: deploy/check.sh          needs python3; kubectl if it is there
set -euo pipefail
cd "$(dirname "$0")"
target=${CARGO_TARGET_DIR:-../target}
venv=$target/tools/venv
version=1.32
if ! "$venv/bin/kubernetes-validate" --help >/dev/null 2>&1; then
    mkdir -p "$target"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check 'kubernetes-validate>=1.32'
fi

rendered=$target/deploy-rendered.yaml
if command -v kubectl >/dev/null; then
    kubectl kustomize base >"$rendered"
    echo "rendered with kubectl kustomize"
else
    echo "kubectl is not there: the files of the base are checked one by one"
    : >"$rendered"
    for file in base/*.yaml; do
        [ "$file" = base/kustomization.yaml ] && continue
        echo '---' >>"$rendered"
        cat "$file" >>"$rendered"
    done
fi
"$venv/bin/kubernetes-validate" --strict --kubernetes-version "$version" "$rendered"
"$venv/bin/python" policy.py "$rendered" base/mainstay.toml

# The binary of the image is a build of its own, so it is proved here only where it was made.
binary=$(ls -t "$target/$(uname -m)-unknown-linux-musl"/*/mainstay 2>/dev/null | head -1 || true)
if [ -n "$binary" ]; then
    ./from_scratch.sh "$binary"
else
    echo "no static binary was built, so none was run: deploy/image.sh does both"
fi
