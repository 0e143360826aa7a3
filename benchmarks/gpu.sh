#!/usr/bin/env bash
# Tests, benchmarks and studies on a CUDA machine, in commands of under ten minutes each:
#
#   bash benchmarks/gpu.sh tests|bench|studies|papers|all
#
# papers, which takes hours and is not in all: the studies that $PAPERS names, as they are written.
#
# A call stops after LIMIT seconds (default 540) with exit code 75 if something is left: call it again. What is done is
# skipped: it has a result file in $OUT (default benchmarks/results) or in benchmarks/results, and what was begun goes on
# from $STATE (default runs/gpu). Nothing needs to be installed: without .venv, $PYTHON (default python3) runs the checkout.
#
#   BPFREE_DATA    folder of MNIST and CIFAR-10, for the studies (default data/)
#   MNIST_EPOCHS, CIFAR_EPOCHS    of the studies (defaults 20 and 30)
#   PAPERS         studies of the part papers (default: noprop/table1-mnist, -cifar10 and -cifar100, noprop/modern-cifar10, noprop/chain-cifar10, claims-cifar10)
#   WORDS          settings of these studies, such as budget.epochs=1
#   DEVICE         cuda; cpu to try this script without one
#   QUICK=--quick  smoke runs of bench and studies
set -u
cd "$(dirname "$0")/.."
PART=${1:-all}
DEVICE=${DEVICE:-cuda}
RESULTS=benchmarks/results
OUT=${OUT:-$RESULTS}
STATE=${STATE:-runs/gpu}
QUICK=${QUICK:-}
END=$((SECONDS + ${LIMIT:-540}))
export OMP_WAIT_POLICY=PASSIVE MLFLOW_DISABLE_TELEMETRY=true PYTHONUNBUFFERED=1
export BPFREE_DATA=${BPFREE_DATA:-$PWD/data} BPFREE_TEST_DEVICE=$DEVICE
mkdir -p "$OUT" "$STATE"

if [ -z "${PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
if ! "$PYTHON" -c 'import importlib.metadata as m; m.distribution("bpfree-noprop")' 2>/dev/null; then
  PYTHONPATH=$("$PYTHON" benchmarks/entry_points.py build/entry_points)${PYTHONPATH:+:$PYTHONPATH} || exit 1
  export PYTHONPATH
fi

failed=0

# step NAME COMMAND...: within the time that is left; its marker says that it is done.
step() {
  local name=$1 left=$((END - SECONDS)) rc
  shift
  [ -e "$STATE/$name.done" ] && { echo "== $name: done before"; return 0; }
  if [ "$left" -lt 20 ]; then echo "== $name: no time left, call again"; exit 75; fi
  echo "== $name"
  timeout --signal=TERM --kill-after=20 "$left" "$@"
  rc=$?
  case $rc in
    0) touch "$STATE/$name.done" ;;
    124 | 137 | 143) echo "== $name: not finished, call again"; exit 75 ;;
    *) echo "== $name: failed ($rc)"; failed=1; return "$rc" ;;
  esac
}

# result FILE: whether there is one already.
result() { [ -e "$OUT/$1" ] || [ -e "$RESULTS/$1" ]; }

# One step per test file, so that a long suite can be cut anywhere; the result file lists them all.
tests() {
  local file=tests-$DEVICE.txt path name summary=$STATE/tests.log
  result "$file" && { echo "== tests: $file is there"; return 0; }
  for path in $(find tests plugins/*/tests -name 'test_*.py' ! -name test_benchmarks.py | sort); do
    name=${path//\//-}
    step "$name" bash -c '"$0" -m pytest -q -p no:cacheprovider "$1" > "$2" 2>&1; rc=$?; tail -n 3 "$2"; [ $rc -eq 5 ] && rc=0; exit $rc' \
      "$PYTHON" "$path" "$STATE/$name.log"
  done
  [ $failed -eq 0 ] || { for name in "$STATE"/*.py.log; do [ -e "${name%.log}.done" ] || tail -n 40 "$name"; done; return 1; }
  { "$PYTHON" -c 'import torch; print("torch", torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")'
    for path in "$STATE"/*.py.log; do echo "$(basename "$path" .log): $(tail -n 1 "$path")"; done; } > "$summary"
  cp "$summary" "$OUT/$file"
}

bench() {
  local name
  for name in trainer_overhead streamed noprop_step noprop_inference noprop_memory feedback_step forward_gradient_step forward_gradient_memory gradient_free_memory hebbian_step local_losses_step predictive_coding_step; do
    result "$name-$DEVICE.json" && { echo "== $name: its result is there"; continue; }
    # $QUICK is empty or one word
    step "bench-$name" "$PYTHON" "benchmarks/$name.py" --device "$DEVICE" --save "$OUT" $QUICK
  done
}

# Interrupted by the time limit they save a checkpoint, and the next call resumes them.
studies() {
  result "accuracy_mnist_paper-$DEVICE.json" || step study-mnist "$PYTHON" benchmarks/accuracy.py mnist --paper \
    --epochs "${MNIST_EPOCHS:-20}" --device "$DEVICE" --output "$STATE/mnist" --save "$OUT" $QUICK
  result "accuracy_cifar10_paper-$DEVICE.json" || step study-cifar10 "$PYTHON" benchmarks/accuracy.py cifar10 --paper \
    --epochs "${CIFAR_EPOCHS:-30}" --device "$DEVICE" --output "$STATE/cifar10" --save "$OUT" $QUICK
}

papers() {
  local name file
  for name in ${PAPERS:-noprop/table1-mnist noprop/table1-cifar10 noprop/table1-cifar100 noprop/modern-cifar10 noprop/chain-cifar10 claims-cifar10 biotorch-cifar10}; do
    file=study_${name//\//-}-$DEVICE
    result "$file.csv" && { echo "== $name: its result is there"; continue; }
    # $WORDS are words
    step "$file" "$PYTHON" -m bpfree study run "$name" "device=$DEVICE" "output=$STATE/runs" tracking.enabled=false --to "$STATE/$file" --quiet \
      ${WORDS:-} || continue
    cp "$STATE/$file"/*results.csv "$OUT/$file.csv" && cp "$STATE/$file"/report*.md "$OUT/$file.md"
  done
}

case $PART in
  tests | bench | studies | papers) $PART ;;
  all) tests; bench; studies ;;
  *) echo "usage: bash benchmarks/gpu.sh tests|bench|studies|papers|all" >&2; exit 2 ;;
esac
exit $failed
