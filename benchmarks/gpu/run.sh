#!/usr/bin/env bash
# All that this project wants to know of a GPU, in under eight minutes: tests marked for a GPU, OOMptimizer's plan
# against real peaks, a training at 0.9 of the memory, and the speed of a step. Each part is written to
# benchmarks/results/gpu.json when it is done, so that being cut off loses only what was not reached.
#
# Usage: benchmarks/gpu/run.sh [--output FILE] [--seconds 460] [--parts tests memory_salm_t5 ...] [--tiny]
# PYTHON names the interpreter, by default python3; `--tiny` runs it on the CPU with tiny models, as a rehearsal.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" benchmarks/gpu/measure.py "$@"
