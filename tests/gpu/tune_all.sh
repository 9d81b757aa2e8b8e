#!/usr/bin/env bash
# `fastft tune` for every model of bench/shapes.py, shared out among several GPUs of one machine: each takes the next model when it has done one.
#
#   tests/gpu/tune_all.sh SECONDS GPU...      tests/gpu/tune_all.sh 500 1 2 3
#
# After tests/gpu/run.sh, which installs what is needed, or beside it on another GPU. Sizes that two models share are tuned once. Attention, whose
# candidates take half a minute a launch to compile, comes last; the loss, whose time is its products', is left out. Nothing is begun in the last 40 of SECONDS, so that what is tuned can be written.
# $OUT gets tune_all.txt (what was found) and tuned.json (for autotune/databases). Exit status: 0 if a record was written.
set -uo pipefail
cd "$(dirname "$0")/../.."
end=$(($(date +%s) + $1 - 40)) && shift
python=${PYTHON:-python3}
out=${OUT:-/tmp/fastft-out}
export PYTHONPATH=${FASTFT_SITE:-/tmp/site} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/triton-cache} HF_HUB_OFFLINE=1
mkdir -p "$out" /tmp/tune

# A line for each model and sort of op. A wheel does not know the names of bench/shapes.py.
"$python" - >/tmp/tune/jobs <<'EOF'
import json, pathlib, sys
sys.path.insert(0, ".")
from bench.shapes import MODELS
from fastft.autotune.cases import cases
from fastft.kernels import OPS, load
from fastft.kernels._config import SPACES
load()
files, later = {space.split(".")[0] for space in SPACES} - {"attention", "linear_cross_entropy"}, []
for name, fields in MODELS.items():
    if name == "tiny":
        continue
    path = pathlib.Path("/tmp/tune", name, "config.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(fields))
    ops = dict.fromkeys(case.op for case in cases(fields, 4, 2048))
    print(name, ",".join(op for op in ops if OPS[op].call.__module__.rpartition(".")[2] in files))
    later.append((name, "attention"))
for job in later:
    print(*job)
EOF
export OUT=$out GPUS="$*" END=$end PYTHON=$python
one() { # MODEL OPS, on the GPU of this slot
  local gpus=($GPUS) left=$((END - $(date +%s))) log=/tmp/tune/$1-${2%%,*}.txt
  ((left > 0)) || return 0
  echo "== $1 --ops $2" >"$log"
  # SIGTERM ends it as Ctrl-C does.
  CUDA_VISIBLE_DEVICES=${gpus[$SLOT]} timeout -k 5 $((left + 20)) "$PYTHON" -m fastft tune --model "/tmp/tune/$1/config.json" --ops "$2" \
    --budget "$left" >>"$log" 2>"$log.err" || tail -3 "$log.err" >>"$log"
  cat "$log" >>"$OUT/tune_all.txt"
}
export -f one
"$python" -c 'import torch; print(torch.cuda.get_device_name(), torch.__version__)' >"$out/tune_all.txt"
echo "commit ${FASTFT_COMMIT:-$(cat .device/commit 2>/dev/null)}" >>"$out/tune_all.txt"
xargs -a /tmp/tune/jobs -P $# --process-slot-var=SLOT -L 1 bash -c 'one "$@"' one
"$python" -m fastft tune --export "$out/tuned.json" >>"$out/tune_all.txt"
