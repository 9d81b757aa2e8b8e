#!/usr/bin/env bash
# The one command for the GPU machine (Python 3.12, torch, no network). Run bench/device_pack.sh before, carry .device along.
#
#   tests/gpu/run.sh STEP[:SECONDS] [ARGUMENTS] [-- STEP[:SECONDS] [ARGUMENTS]]...
#
# Steps, in order, each within its SECONDS (default: what is left); with ++ in place of --, beside the one before (nothing timed, then):
#   kernels [pytest arguments]         tests/kernels on CUDA (the derivations need no GPU)
#   bench [bench kernels arguments]    fastft bench kernels (--shapes-tag real: the whole table, in two or more calls; -k rms_norm: one op).
#                                      The JSON has every case that was finished; cases that no time is left for are not begun
#   compare [train.py arguments]       bench/train.py compare
#   run [train.py arguments]           bench/train.py run
#   checkpoint MODEL                   write a random-weight checkpoint
#   errors model|ops [arguments]       bench/errors.py: gradient errors of models, of every op
#   tune MODEL [tune arguments]        fastft tune for a model of bench/shapes.py; what is tuned is in tuned.json
#   sanitize [memcheck] [racecheck]    tests/gpu/sanitize.sh: compute-sanitizer over every kernel (default both)
#   large                              tests/gpu/test_large.py: tensors of more than 2³¹ elements
#   pytest [arguments]                 any other tests
#   python [arguments]                 any other script
# $OUT gets summary.txt, log.txt and each step's JSON (junit XML for tests). The summary is printed last. LIMIT_S (570) bounds it all.
# Exit status: 0 if every step's was.
set -uo pipefail
cd "$(dirname "$0")/../.."
started=$SECONDS
limit=${LIMIT_S:-570}
python=${PYTHON:-python3}
out=${OUT:-/tmp/fastft-out}
site=${FASTFT_SITE:-/tmp/site}
peers=${FASTFT_PEERS:-/tmp/peers}
mkdir -p "$out"
log=$out/log.txt summary=$out/summary.txt
: >"$log" >"$summary"

left() { echo $((limit - (SECONDS - started))); }
note() { echo "$*" | tee -a "$log" >>"$summary"; }

unpack() { # ARCHIVE FOLDER: once per machine and archive
  local mark; mark=$(cksum <"$1") || return 1
  [[ -f $2/.packed && $(<"$2/.packed") == "$mark" ]] && return 0
  rm -rf "$2" && mkdir -p "$2" && tar -C "$2" -xJf "$1" && echo "$mark" >"$2/.packed"
}

install_fastft() { # from the tree that came along; from the wheel where pip's setuptools is too old for pyproject.toml
  local copy built
  copy=$(mktemp -d) built=$(mktemp -d)
  cp -r pyproject.toml backend patterns kernels autotune "$copy" || return 1
  for file in README.md LICENSE; do if [[ -f $file ]]; then cp "$file" "$copy"; else touch "$copy/$file"; fi; done
  rm -rf "$site"/fastft "$site"/fastft-*.dist-info
  if "$python" -m pip wheel -q --no-index --no-deps --no-build-isolation -w "$built" "$copy" >>"$log" 2>&1; then
    "$python" -m pip install -q --upgrade --no-index --no-deps --no-compile --target "$site" "$built"/fastft-*.whl >>"$log" 2>&1 || return 1
  else
    "$python" -m pip install -q --upgrade --no-index --no-deps --no-compile --target "$site" .device/fastft-*.whl >>"$log" 2>&1 || return 1
    local folder part stale=0
    for folder in backend kernels patterns autotune; do
      part=$site/fastft/${folder#backend}
      diff -rq -x __pycache__ -x kernels -x patterns -x autotune "$folder" "$part" >>"$log" || stale=1
    done
    ((stale == 0)) || { note "the wheel in .device is not this tree: run bench/device_pack.sh"; return 1; }
  fi
  rm -rf "$copy" "$built"
}

unpack .device/site.tar.xz "$site" || { note "cannot unpack .device/site.tar.xz: is .device carried?"; cat "$summary"; exit 1; }
if [[ " $* " == *liger* || " $* " == *unsloth* || " $* " =~ \ bench(:[0-9]+)?\  ]]; then unpack .device/peers.tar.xz "$peers" || note "no peers"; fi
install_fastft || { note "fastft cannot be installed here"; tail -20 "$log"; cat "$summary"; exit 1; }
# The pack says what is measured: a tree that travelled has no .git, or one that knows only what had landed.
commit=$(cat .device/commit 2>/dev/null) || commit=unknown
export FASTFT_COMMIT=$commit
export PYTHONPATH=$site PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-cache}
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
note "$("$python" -c '
import sys, torch, fastft
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"{device}, torch {torch.__version__}, python {sys.version.split()[0]}, fastft from {fastft.__path__[0]}")' 2>&1 | tail -1)"
note "commit $commit, set up after $((SECONDS - started)) s"

workers=$(nproc)
number=0
parts=$(mktemp -d) # a step's summary, and a file for each failure
step() { # STEP[:SECONDS] ARGUMENTS...
  local name=${1%%:*} seconds at=$SECONDS code result show=tail
  seconds=$(left)
  [[ $1 == *:* ]] && ((${1#*:} < seconds)) && seconds=${1#*:}
  shift
  result=$out/$number-$name
  local summary=$parts/$number
  if ((seconds < 10)); then note "== $name: not started, no time left"; touch "$summary.failed"; return; fi
  local output; output=$(mktemp)
  local command
  case $name in
    kernels) command=(env OMP_NUM_THREADS=1 TRITON_INTERPRET=0 "$python" -m pytest -o addopts=--import-mode=importlib tests/kernels --ignore tests/kernels/test_derivations.py -v --durations 12 -p no:cacheprovider --no-header --tb=short -rfE -n "$workers" --dist worksteal --junitxml "$result.xml") ;;
    # Liger and cut-cross-entropy lie with the peers, beside other versions of what is in $site: that goes first.
    bench) command=(env PYTHONPATH="$site:$peers" "$python" bench/cli.py kernels --budget $((seconds > 60 ? seconds - 30 : seconds / 2)) --out "$result.json") ;;
    compare) command=("$python" bench/train.py compare --peers "$peers" --budget $((seconds - 10)) --log "$log" --out "$result.json") ;;
    run) command=("$python" bench/train.py run --out "$result.json") ;;
    checkpoint) command=("$python" bench/train.py checkpoint --model) ;;
    errors) command=("$python" bench/errors.py) && set -- "$@" --out "$result.json" ;;
    sanitize) command=(env SANITIZE_S=$((seconds - 8)) PYTHON="$python" tests/gpu/sanitize.sh) ;;
    tune)
      # A wheel does not know the names of bench/shapes.py.
      local config=/tmp/tune/$1/config.json
      mkdir -p "${config%/*}"
      "$python" -c "import json, sys; sys.path.insert(0, '.'); from bench.shapes import MODELS; print(json.dumps(MODELS[sys.argv[1]]))" "$1" >"$config"
      shift
      command=("$python" -m fastft tune --model "$config") ;;
    large) command=("$python" -m pytest -o addopts=--import-mode=importlib tests/gpu/test_large.py -v --durations 12 -p no:cacheprovider --no-header --tb=short -rfEs --junitxml "$result.xml") ;;
    pytest) command=("$python" -m pytest -p no:cacheprovider --no-header --tb=short -rfE --junitxml "$result.xml") ;;
    python) command=("$python") ;;
    *) note "== $name: no such step (kernels, bench, compare, run, checkpoint, errors, tune, sanitize, large, pytest, python)"; touch "$summary.failed"; return ;;
  esac
  echo "== $name $*" | tee -a "$log"
  OUT=$out timeout -k 5 "$seconds" "${command[@]}" "$@" >"$output" 2>&1
  code=$?
  [[ $name != tune ]] || "$python" -m fastft tune --export "$out/tuned.json" >>"$output" 2>&1
  cat "$output" >>"$log"
  note "== $name $*: $([[ $code == 124 || $code == 137 ]] && echo "stopped after $seconds s" || echo "exit $code"), $((SECONDS - at)) s"
  # What a reader wants of each: a compare's table, the short summary of tests, the end of anything else.
  case $name in
    compare) grep -v '^\[bench' "$output" | tail -40 ;;
    errors) grep -E '[│┃]|Error' "$output" | sed 's/[│┃]/|/g; s/  */ /g' | tail -$([[ $1 == model ]] && echo 9 || echo 45) | cut -c1-220 ;;
    large) grep -E '^(FAILED|ERROR|SKIPPED) |(passed|failed|error|skipped).* in |s call ' "$output" | cut -c1-220 | tail -40 ;;
    kernels | pytest) grep -E '^(FAILED|ERROR) |(passed|failed|error).* in ' "$output" | cut -c1-220 | tail -40 ;;
    bench) grep -E '^(FAILED|ERROR|SKIPPED) |(passed|failed|skipped|error).* in |: µs, |^Not here|[│┃]' "$output" | cut -c1-400 | tail -70 ;;
    *) tail -25 "$output" | cut -c1-300 ;;
  esac >>"$summary"
  rm -f "$output"
  ((code == 0)) || touch "$summary.failed"
}

words=()
for word in "$@" --; do
  if [[ $word == -- || $word == ++ ]]; then
    if ((${#words[@]})); then number=$((number + 1)); step "${words[@]}" & fi
    [[ $word == ++ ]] || wait
    words=()
  else
    words+=("$word")
  fi
done
for ((i = 1; i <= number; i++)); do cat "$parts/$i" >>"$summary"; done
failures=$(find "$parts" -name '*.failed' | wc -l)
note "all steps: $((SECONDS - started)) s, $failures failed"
# The caller sees only the end of the output.
echo; tail -c 9000 "$summary"
((failures == 0))
