#!/usr/bin/env bash
# Everything a GPU machine is for, in one call of under ten minutes, into one folder of eight files:
# summary.txt (the machine, and what passed), log.txt (build, tests, sanitizer), bench.md,
# samples.json, scaling.png, conv.png, matmul.png and ncu.txt.
#
#   bench/on_gpu.sh [--parts info,build,tests,bench,sanitize,ncu,suite] [--dry-run]
#
# A part that fails is named in summary.txt and does not stop the others.
#
# Needs no network and no virtual environment. Environment:
#   OUT            results folder (default bench/results/gpu-<date>)
#   PYTHON         interpreter that has torch (default python3)
#   ISSP_REVISION  git revision, where the copy of the checkout has no .git
#   BENCH          benchmarks of the part bench, such as "must-show conv matmul" (default all)
#   DEADLINE       seconds for everything (default 570)
#   ISSP_BACKEND   the back end that is tested and measured (default cuda), such as triton
# Exit status: 0 all parts passed, 1 a part failed, 2 bad arguments, 3 no GPU, 4 another back end.
set -u -o pipefail

ALL_PARTS="info build tests bench sanitize ncu suite"
GPU_PARTS="tests bench sanitize ncu suite"
PYTHON=${PYTHON:-python3}
DEADLINE=${DEADLINE:-570}

die() {
  echo "on_gpu.sh: $1" >&2
  exit "$2"
}

contains() { [[ " $1 " == *" $2 "* ]]; }

parts=$ALL_PARTS
dry_run=0
while (($#)); do
  case $1 in
    --parts)
      (($# > 1)) || die "--parts needs a list such as info,build" 2
      parts=${2//,/ }
      shift
      ;;
    --dry-run) dry_run=1 ;;
    *) die "unknown argument '$1': use --parts LIST or --dry-run" 2 ;;
  esac
  shift
done
for part in $parts; do
  contains "$ALL_PARTS" "$part" || die "unknown part '$part': choose from $ALL_PARTS" 2
done

cd "$(dirname "${BASH_SOURCE[0]}")/.." || die "the checkout cannot be entered" 2
OUT=${OUT:-bench/results/gpu-$(date +%Y-%m-%d)}
SECONDS=0

needs_gpu=0
for part in $parts; do
  contains "$GPU_PARTS" "$part" && needs_gpu=1
done
if ((needs_gpu && !dry_run)); then
  # Quick to tell apart from a GPU that torch cannot use.
  command -v nvidia-smi >/dev/null ||
    die "no GPU driver here (nvidia-smi is missing): only the parts info and build can run" 3
  "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" ||
    die "torch sees no CUDA device here: only the parts info and build can run" 3
fi

# run LIMIT FILE COMMAND...: appends the output to FILE, within LIMIT and what the deadline leaves.
run() {
  local limit=$1 file=$2 left=$((DEADLINE - SECONDS))
  shift 2
  if ((dry_run)); then
    echo "  [$limit s, $file] $*"
    return 0
  fi
  ((left > 5)) || { echo "no time left for: $*" | tee -a "$OUT/$file"; return 124; }
  echo "\$ $*" >>"$OUT/$file"
  timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" 2>&1 | tee -a "$OUT/$file"
}

# Figures of one back end must never be told as another's: asked once, after the build.
require_back_end() {
  run 60 summary.txt "$PYTHON" -W ignore -c "
import sys
try:
    from issp import backends
except RuntimeError as error:
    sys.exit(f'on_gpu.sh: {error}')
active, wanted = backends.active('cuda'), sys.argv[1]
why = backends.problems().get(wanted, 'issp info says more')
if active != wanted:
    sys.exit(
        f'on_gpu.sh: on cuda {active} is active, not {wanted}: {why} '
        f'(ISSP_BACKEND={active} tests and measures {active})'
    )
print(f'on cuda {active} is active')
" "${ISSP_BACKEND:-cuda}" || exit 4
}

tool() {
  ((dry_run)) || command -v "$1" >/dev/null || { echo "$1 is not on the PATH"; return 1; }
}

part_info() {
  local status=0
  if command -v nvidia-smi >/dev/null; then
    run 20 summary.txt nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit --format=csv || status=1
  fi
  run 60 summary.txt "$PYTHON" -m bench.describe || status=1
  return $status
}

part_build() {
  # For this GPU alone: the wheel's other architectures would take most of the time.
  local capability archs
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
  archs=${capability//./}
  [[ $archs == 90 ]] && archs=90a
  run 150 log.txt env ISSP_CUDA=1 ISSP_CUDA_ARCHS="${ISSP_CUDA_ARCHS:-${archs:-90a}}" \
    "$PYTHON" setup.py build_ext --inplace
}

part_tests() {
  run 120 log.txt env ISSP_STRICT=1 "$PYTHON" -m pytest tests -q -p no:cacheprovider -k "cuda and not emulator"
}

part_sanitize() {
  tool compute-sanitizer || return 1
  local status=0 check
  for check in memcheck racecheck synccheck; do
    # The caching allocator would hide what lies beyond the end of a tensor.
    run 60 log.txt env ISSP_STRICT=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool "$check" --error-exitcode 9 "$PYTHON" -m bench.sanitize || status=1
  done
  return $status
}

part_bench() {
  # Benchmarks in processes of their own, each with its limit; bench.md says which failed.
  local only=()
  [[ -z ${BENCH:-} ]] || read -ra only <<<"--only $BENCH"
  run 420 log.txt env ISSP_STRICT=1 "$PYTHON" -m bench all --device cuda --folder "$OUT" "${only[@]}"
}

part_ncu() {
  tool ncu || return 4
  local metrics status=0
  metrics=$(tr '\n' ',' <<'END' | sed 's/,$//'
gpu__time_duration.sum
dram__bytes_read.sum
dram__bytes_write.sum
dram__throughput.avg.pct_of_peak_sustained_elapsed
sm__warps_active.avg.pct_of_peak_sustained_active
launch__registers_per_thread
launch__occupancy_limit_shared_mem
smsp__sass_inst_executed_op_local_ld.sum
sm__throughput.avg.pct_of_peak_sustained_elapsed
END
)
  local ncu=(ncu --clock-control none --profile-from-start off --metrics "$metrics")
  run 90 ncu.txt "${ncu[@]}" "$PYTHON" -m bench.profile step --steps 1 || status=1
  run 90 ncu.txt "${ncu[@]}" "$PYTHON" -m bench.profile sparse || status=1
  return $status
}

part_suite() {
  run 300 log.txt "$PYTHON" -m pytest tests -q -p no:cacheprovider -m "not full"
}

if ((!dry_run)); then
  mkdir -p "$OUT" || die "the results folder $OUT cannot be made" 2
  for file in summary.txt log.txt bench.md samples.json {scaling,conv,matmul}.png ncu.txt; do
    rm -f "${OUT:?}/$file"
  done
fi

table=()
failed=0
asked=0
for part in $parts; do
  if ((!asked)) && contains "$GPU_PARTS" "$part"; then
    require_back_end
    asked=1
  fi
  echo "== $part"
  begin=$SECONDS
  "part_$part"
  code=$?
  result=failed
  case $code in
    0) result=passed ;;
    4) result="skipped: its tool is not installed" ;;
    124) result="failed: out of time" ;;
  esac
  ((code == 0 || code == 4)) || failed=1
  table+=("$(printf '| %-8s | %-35s | %5d |' "$part" "$result" $((SECONDS - begin)))")
done
((dry_run)) && exit 0
{
  echo
  echo "| part     | result                              |     s |"
  echo "| -------- | ----------------------------------- | ----: |"
  printf '%s\n' "${table[@]}"
} | tee -a "$OUT/summary.txt"
exit $failed
