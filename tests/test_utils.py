"""The frame every script runs in."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_script_whose_output_nobody_reads_ends_without_a_word():
    code = "from animatediff.utils import run_main\nrun_main(lambda: [print(i, flush=True) for i in range(100000)])"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as script:
        assert script.stdout.readline() == b"0\n"
        script.stdout.close()
        assert script.stderr.read() == b"" and script.wait() == 141
