"""What is run on a card: `benchmarks/gpu_suite.sh`, which is `python -m benchmarks.gpu.suite`."""
