#!/usr/bin/env bash
# compute-sanitizer over every Triton kernel (tests/gpu/launch_all.py): memcheck (accesses out of bounds), racecheck (races in shared memory).
#
#   tests/gpu/sanitize.sh [TOOL]...      default: memcheck racecheck
#
# Each tool must first find a mistake planted for it: a tool that sees nothing is no evidence. Then it runs over all launches, in PARTS processes,
# with kernels compiled beforehand. Memory is not cached by PyTorch, so that every tensor has the bounds that it was allocated with.
# $OUT gets sanitize-TOOL.txt (what was found, and each process's last lines). SANITIZE_S (150) seconds bound it all.
# Exit status: 0 if every tool found its planted mistake and nothing else.
set -uo pipefail
cd "$(dirname "$0")/../.."
started=$SECONDS
limit=${SANITIZE_S:-150}
python=${PYTHON:-python3}
out=${OUT:-/tmp/fastft-out}
parts=${PARTS:-4}
if (($#)); then tools=("$@"); else tools=(memcheck racecheck); fi
mkdir -p "$out"
work=$(mktemp -d)
left() { local s=$((limit - (SECONDS - started))); echo $((s > 1 ? s : 1)); }

sanitizer=$(command -v compute-sanitizer || ls -d /usr/local/cuda*/bin/compute-sanitizer /usr/local/cuda*/compute-sanitizer/compute-sanitizer 2>/dev/null | tail -1)
[[ -n $sanitizer ]] || { echo "compute-sanitizer is neither on the PATH nor under /usr/local/cuda*"; exit 1; }
"$sanitizer" --version | tail -1
cores=$(env -u OMP_NUM_THREADS nproc) # which obeys OpenMP's variables
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 TRITON_INTERPRET=0

# Ours and PyTorch's elementwise kernels are checked; cuBLAS's and cuDNN's, whose names end otherwise, are not.
filter=(--kernel-name kernel_substring=_kernel)
# Under racecheck a product of cuBLAS broke off (its splitKreduce_kernel, most likely; memcheck sees nothing): for it, kernels by name, any of which may fit.
# The planted one stands between others: were the first filter or the last one all that counts, it would not be found.
named=(--kernel-name kernel_substring=_delta_kernel --kernel-name kernel_substring=_planted_)
for name in $(grep -rhoE '^def _[a-z0-9_]*_kernel\(' kernels/*.py | sed 's/^def //; s/($//' | sort -u); do named+=(--kernel-name "kernel_substring=$name"); done
check() { # TOOL LOG ARGUMENTS...: launch_all.py under a tool
  local tool=$1 log=$2 options=() plain=()
  shift 2
  [[ $tool == memcheck ]] && options=(--report-api-errors no) # libraries ask for what may not be there, and handle the answer
  [[ $tool == racecheck ]] && plain=(--plain-products) options=(--racecheck-report all) # each hazard with the values written, beside the summary of them
  local only=("${filter[@]}")
  [[ $tool == racecheck && ${#filter[@]} != 0 ]] && only=("${named[@]}")
  timeout -k 5 "${within:-$(left)}" "$sanitizer" --tool "$tool" "${options[@]}" "${only[@]}" --target-processes application-only --error-exitcode 9 \
    --print-limit 20 "$python" tests/gpu/launch_all.py "${plain[@]}" "$@" >"$log" 2>&1
}
declare -A mistake=([memcheck]=out-of-bounds [racecheck]=race)
declare -A evidence=([memcheck]='Invalid __global__ write' [racecheck]='[Rr]ace reported|[1-9][0-9]* hazards? displayed')
planted() { # TOOL: whether it finds the mistake that is planted for it. A tool hangs at times before it has begun: then it begins again.
  local within=45 try
  for try in 1 2; do
    check "$1" "$work/planted-$1" --planted "${mistake[$1]}"
    (($? == 124)) || break
  done
  grep -qE "${evidence[$1]}" "$work/planted-$1" && grep -q _planted_ "$work/planted-$1"
}

# Compile while the planted mistakes are looked for.
compilers=$((cores > 3 ? cores - 2 : 1)) warm=()
for ((i = 0; i < compilers; i++)); do
  timeout -k 5 "$(left)" "$python" tests/gpu/launch_all.py --part "$i/$compilers" >"$work/warm-$i" 2>&1 &
  warm+=($!)
done
timeout "$(left)" "$python" tests/gpu/launch_all.py --list | sort >"$work/kernels" &
warm+=($!)
for tool in "${tools[@]}"; do
  { planted "$tool" || { filter=() && planted "$tool" && touch "$work/unfiltered-$tool"; }; } && touch "$work/found-$tool" &
  warm+=($!)
done
wait "${warm[@]}"
cold=$(grep -LE '^[0-9]+ calls; ' "$work"/warm-* | wc -l)
echo "compiled and launched in $compilers processes, $cold of them failed, after $((SECONDS - started)) s"
((cold == 0)) || tail -5 $(grep -LE '^[0-9]+ calls; ' "$work"/warm-* | head -1)
failures=$cold

pids=()
for tool in "${tools[@]}"; do
  if [[ ! -f $work/found-$tool ]]; then
    echo "$tool: did not find the planted mistake (${mistake[$tool]}), so it would prove nothing"
    tail -15 "$work/planted-$tool"
    failures=$((failures + 1))
    continue
  fi
  for ((i = 0; i < parts; i++)); do
    {
      [[ -f $work/unfiltered-$tool ]] && filter=()
      check "$tool" "$work/$tool-$i" --part "$i/$parts"
      echo $? >"$work/$tool-$i.code"
    } &
    pids+=($!)
  done
done
((${#pids[@]})) && wait "${pids[@]}"

for tool in "${tools[@]}"; do
  log=$out/sanitize-$tool.txt
  {
    echo "$("$sanitizer" --version | tail -1), --tool $tool, $([[ -f $work/unfiltered-$tool ]] && echo "all kernels" || echo "kernels by name (racecheck: ours)")"
    echo "commit ${FASTFT_COMMIT:-unknown}"
    echo "== planted: ${mistake[$tool]}, $([[ -f $work/found-$tool ]] && echo found || echo "not found")"
    grep -E "${evidence[$tool]}|_planted_|SUMMARY" "$work/planted-$tool" | head -8
  } >"$log"
  [[ -f $work/found-$tool ]] || continue
  clean=0 launches=0
  for ((i = 0; i < parts; i++)); do
    code=$(cat "$work/$tool-$i.code")
    echo "== part $i of $parts: exit $code" >>"$log"
    # What was found first, then how it ended; a whole log can be long.
    awk '/^at /{at = $0; next} /^=+ +(Invalid|Error|Warning|Race|Program)/ && at {print at; at = ""} {print}' "$work/$tool-$i" |
      grep -vE 'SUMMARY|^[0-9]+ calls; ' | head -90 | cut -c1-200 >>"$log"
    grep -E 'SUMMARY|^[0-9]+ calls; ' "$work/$tool-$i" >>"$log"
    calls=$(grep -oE '^[0-9]+ calls' "$work/$tool-$i" | cut -d' ' -f1)
    launches=$((launches + ${calls:-0}))
    [[ $code == 0 && -n $calls ]] && grep -qE 'SUMMARY: 0 (errors|hazards)' "$work/$tool-$i" && clean=$((clean + 1))
  done
  grep -hE '^[0-9]+ calls; ' "$work/$tool"-[0-9]* | sed 's/.*kernels: //' | tr ' ' '\n' | sort -u >"$work/launched"
  missing=$(comm -23 "$work/kernels" "$work/launched" | tr '\n' ' ')
  kernels="$(comm -12 "$work/kernels" "$work/launched" | wc -l) of $(wc -l <"$work/kernels") kernels"
  verdict="planted ${mistake[$tool]} found; $launches calls of ops, $kernels, $clean of $parts processes clean${missing:+; never launched: $missing}"
  echo "$tool: $verdict" | tee -a "$log"
  [[ -s $work/kernels && -z $missing ]] || failures=$((failures + 1))
  ((clean == parts)) || { failures=$((failures + 1)); grep -hE '^=+ +(Invalid|Error|Warning|Race|Program)|SUMMARY' "$work/$tool"-[0-9]* | sort | uniq -c | sort -rn | head -12; }
done
echo "sanitize: $((SECONDS - started)) s, $failures failed"
rm -rf "$work"
((failures == 0))
