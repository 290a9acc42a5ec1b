"""proxyset as the scripts beside this one call it."""

import json
import subprocess
import sys


def run(program, *arguments):
    """What the program prints with `--json`; its error ends the script."""
    command = [str(part) for part in (program, *arguments, "--json", "--quiet")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)
