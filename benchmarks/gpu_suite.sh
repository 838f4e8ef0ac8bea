#!/usr/bin/env bash
# Builds, tests and measures fusetune on a machine with an NVIDIA GPU, in under 9 minutes, with the
# Python, torch and nvcc that are there; nothing is downloaded and nothing is installed.
#
#   benchmarks/gpu_suite.sh               all steps; called again it goes on where it stopped
#   benchmarks/gpu_suite.sh --half 1      correctness, and the first measurements; then --half 2
#   benchmarks/gpu_suite.sh --simulate    without a card: the same steps on the simulator, no timings
#
# PYTHON: an interpreter that has torch (default: .venv/bin/python, python3 or python).
set -euo pipefail
cd "$(dirname "$0")/.."
for python in "${PYTHON:-}" .venv/bin/python python3 python; do
  if [ -n "$python" ] && "$python" -c "import torch" 2>/dev/null; then
    exec "$python" -m benchmarks.gpu.suite "$@"
  fi
done
echo "no Python that has torch was found: set PYTHON" >&2
exit 2
