"""proxyset as the scripts beside this one call it."""

import json
import os
import subprocess
import sys
import time


def run(program, *arguments):
    """What the program prints with `--json`; its error ends the script."""
    command = [str(part) for part in (program, *arguments, "--json", "--quiet")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def peak(command, environment=None):
    """Seconds and peak resident memory, in MiB, of a process."""
    before = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, **(environment or {})}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command} ended with {status}")
    return time.perf_counter() - before, usage.ru_maxrss / 1024
