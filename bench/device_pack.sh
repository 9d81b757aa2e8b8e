#!/usr/bin/env bash
# Packs what the GPU machine lacks into .device/ (git-ignored), to be carried there beside the working tree:
#   site.tar.xz    bitsandbytes, trl, datasets                 peers.tar.xz  the same in the versions that Unsloth takes, liger, unsloth, xformers
#   fastft-*.whl   this tree, in case pip cannot build there   commit        what is measured
#   tree.tar.gz    the commit's files, to measure a commit while the working tree changes
# Run before every call (seconds; the archives are made once). Then, on the GPU machine: tests/gpu/run.sh, with .device carried; or, for the commit alone:
#   mkdir /tmp/tree && tar -C /tmp/tree -xzf .device/tree.tar.gz && ln -s "$PWD/.device" /tmp/tree/.device && cd /tmp/tree && tests/gpu/run.sh ...
#   SITE=path/to/make_site.sh bench/device_pack.sh    the script that downloads the archives' packages
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
device=$root/.device
python=${PYTHON:-python3}
make_site=${SITE:-$root/../shared/device/make_site.sh}
mkdir -p "$device"
# Pure Python that may be missing there: parallel tests, tables, the command line.
extra=(pytest-xdist execnet hypothesis sortedcontainers rich markdown-it-py mdurl pygments typer shellingham click annotated-doc
  pydantic pydantic-core annotated-types typing-inspection typing-extensions)
# xformers' wheel is for CUDA 12 (torch there is for 13).
cuda_12=(nvidia-cuda-runtime-cu12==12.8.90)

archive() { # NAME OPTION PACKAGES: what make_site.sh makes, and these, once
  local out=$device/$1.tar.xz option=$2 more
  shift 2
  [[ ! -f $out ]] || return 0
  bash "$make_site" "$device/base.tar.xz" ${option:+"$option"}
  more=$(mktemp -d)
  tar -C "$more" -xJf "$device/base.tar.xz"
  "$python" -m pip install -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux2014_x86_64 \
    --target "$more" -c "$root/constraints.txt" "$@"
  # A package of its own, nvidia would hide the one that torch's libraries are in.
  rm -rf "$more/nvidia/cuda_runtime/include" "$more/nvidia/__init__.py"
  tar -C "$more" -cJf "$out" . && rm -rf "$more" "$device/base.tar.xz"
}
archive site "" "${extra[@]}"
archive peers --peers "${cuda_12[@]}"

# All from the commit: what lies in the tree uncommitted is neither in the wheel nor in the archive.
git -C "$root" archive -o "$device/tree.tar.gz" HEAD
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
tar -C "$copy" -xzf "$device/tree.tar.gz"
rm -f "$device"/fastft-*.whl
"$python" -m pip wheel -q --no-deps -w "$device" "$copy"

git -C "$root" rev-parse HEAD >"$device/commit"
dirty=$(git -C "$root" status --porcelain --untracked-files=no)
[[ -z $dirty ]] || echo "not committed, not in tree.tar.gz, and wrong to measure in place:"$'\n'"$dirty"
ls -la "$device"
total=$(du -sm "$device" | cut -f1)
echo "$total MiB in .device; at most 64 MiB travel, the working tree included"
((total < 56)) || { echo ".device is too large to travel" >&2; exit 1; }
