#!/usr/bin/env bash
# Everything a GPU machine is for, in at most 12 minutes beside the build, into one folder of eight
# files: summary.txt (the machine, what passed), log.txt (build, tests, sanitizer), bench.md,
# samples.json, scaling.png, conv.png, matmul.png and ncu.txt.
#
#   bench/on_gpu.sh [--parts sanitize,parity] [--dry-run]
#
# Parts: info build sanitize parity step optim nm products, and on demand ncu tables suite.
# Without --parts all but those on demand run, and those that summary.txt in the folder says have
# passed are passed over: a call that was interrupted goes on. A part that --parts names runs in any
# case. A part that fails does not stop the others.
#
# Needs no network and no virtual environment. Environment:
#   OUT            results folder (default bench/results/gpu-<date>)
#   RESUME         folder with the results of an earlier call, copied to OUT first
#   PYTHON         interpreter that has torch (default python3)
#   ISSP_REVISION  git revision, where the copy of the checkout has no .git
#   DEADLINE       seconds for this call (default 570: a machine may take commands of 10 minutes)
#   ISSP_BACKEND   the back end that is tested and measured (default cuda), such as triton
# Exit status: 0 all parts passed, 1 a part failed or had no time, 2 bad arguments, 3 no GPU,
# 4 another back end.
set -u -o pipefail

USUAL_PARTS="info build sanitize parity step optim nm products"
ALL_PARTS="$USUAL_PARTS ncu tables suite"
FILES=(summary.txt log.txt bench.md samples.json {scaling,conv,matmul}.png ncu.txt)
PYTHON=${PYTHON:-python3}
DEADLINE=${DEADLINE:-570}

die() {
  echo "on_gpu.sh: $1" >&2
  exit "$2"
}

contains() { [[ " $1 " == *" $2 "* ]]; }

needs_gpu() { ! contains "info build" "$1"; }

parts=$USUAL_PARTS
again=0
dry_run=0
while (($#)); do
  case $1 in
    --parts)
      (($# > 1)) || die "--parts needs a list such as info,build" 2
      parts=${2//,/ }
      again=1
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
RESUME=${RESUME:-}
[[ -z $RESUME || -f $RESUME/summary.txt ]] ||
  die "RESUME=$RESUME has no summary.txt: name the folder of an earlier call" 2
SECONDS=0

gpu_wanted=0
for part in $parts; do
  needs_gpu "$part" && gpu_wanted=1
done
if ((gpu_wanted && !dry_run)); then
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
  run 30 summary.txt "$PYTHON" -W ignore -c "
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
    run 5 summary.txt nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit --format=csv || status=1
  fi
  run 20 summary.txt "$PYTHON" -m bench.describe || status=1
  return $status
}

part_build() {
  local library=issp/_CUDA.abi3.so capability archs
  if [[ -e $library && -z $(find setup.py csrc -newer "$library" -type f) ]]; then
    echo "$library is newer than every source: it is used as it is"
    return 0
  fi
  # For this GPU alone: the wheel's other architectures would take most of the time.
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
  archs=${capability//./}
  [[ $archs == 90 ]] && archs=90a
  run 240 log.txt env ISSP_CUDA=1 ISSP_CUDA_ARCHS="${ISSP_CUDA_ARCHS:-${archs:-90a}}" \
    "$PYTHON" setup.py build_ext --inplace
}

part_sanitize() {
  tool compute-sanitizer || return 1
  local status=0 check
  for check in memcheck racecheck synccheck initcheck; do
    # The caching allocator would hide what lies beyond the end of a tensor.
    run 30 log.txt env ISSP_STRICT=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool "$check" --error-exitcode 9 "$PYTHON" -m bench.sanitize || status=1
  done
  return $status
}

part_parity() {
  run 100 log.txt env ISSP_STRICT=1 "$PYTHON" -m pytest tests -q -p no:cacheprovider -k "cuda and not emulator"
}

# measure LIMIT NAME...: benchmarks of bench/all.py, each in a process of its own; bench.md says
# which failed.
measure() {
  local limit=$1
  shift
  run "$limit" log.txt env ISSP_STRICT=1 "$PYTHON" -m bench all --device cuda --folder "$OUT" \
    --limit "$((limit / $#))" --only "$@"
}

part_step() { measure 160 step scaling; }

part_optim() { measure 60 optim; }

part_nm() { measure 80 "nm 2:4" "nm 2:32"; }

part_products() { measure 145 must-show; }

part_tables() { measure 500 train conv matmul network; }

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
smsp__inst_executed.sum
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
  run 400 log.txt "$PYTHON" -m pytest tests -q -p no:cacheprovider -m "not full"
}

# Whether an earlier call's table says that a part has passed; the last word on it counts.
has_passed() {
  [[ -f $OUT/summary.txt ]] &&
    [[ $(grep -E "^\| $1 +\| " "$OUT/summary.txt" | tail -n 1) == *"| passed "* ]]
}

# record PART RESULT SECONDS: at once, so that a machine that is taken away leaves what has passed.
record() {
  printf '| %-8s | %-35s | %5d s |\n' "$1" "$2" "$3" | tee -a "$OUT/summary.txt"
}

if ((!dry_run)); then
  mkdir -p "$OUT" || die "the results folder $OUT cannot be made" 2
  for file in "${FILES[@]}"; do
    [[ -z $RESUME || ! -f $RESUME/$file || $RESUME/$file -ef $OUT/$file ]] ||
      cp "$RESUME/$file" "$OUT/$file" || die "$RESUME/$file cannot be copied to $OUT" 2
  done
fi

failed=0
asked=0
for part in $parts; do
  if ((!again && !dry_run)) && has_passed "$part"; then
    echo "== $part has passed before: --parts $part runs it again"
    continue
  fi
  if ((!dry_run && DEADLINE - SECONDS <= 5)); then
    failed=1
    record "$part" "not begun: no time left" 0
    continue
  fi
  if ((!asked)) && needs_gpu "$part"; then
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
  ((dry_run)) || record "$part" "$result" $((SECONDS - begin))
done
((dry_run)) && exit 0
exit $failed
