"""How long `import fusetune` takes beyond `import torch`: python -m benchmarks.import_time"""

import statistics
import subprocess
import sys

PROGRAM = """
import time, torch
begin = time.perf_counter()
import fusetune
print(time.perf_counter() - begin)
"""


def main() -> None:
    runs = [subprocess.check_output([sys.executable, "-c", PROGRAM]) for _ in range(5)]
    print(f"import fusetune, after torch: {1e3 * statistics.median(map(float, runs)):.0f} ms")


if __name__ == "__main__":
    main()
