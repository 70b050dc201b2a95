"""Collect the tests, or run some, as on a system without fork, /proc, FIFOs and terminals.

    python tests/elsewhere.py [--collect-only] [PYTEST'S ARGUMENTS]

Stands in for Windows, as far as what the tests call themselves goes; libraries are as they are.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401  (libraries ask the system at their import, and are not what is tested)
from transformers import GraniteMoeForCausalLM  # noqa: F401

MODULES = ("fcntl", "grp", "pty", "pwd", "resource", "termios", "tty")
NAMES = {
    os: ("fork", "geteuid", "mkfifo", "openpty", "pread", "set_blocking", "seteuid"),
    signal: ("SIGALRM", "SIGKILL", "alarm"),
}


def move() -> None:
    """Make this process one on such a system."""
    sys.modules.update(dict.fromkeys(MODULES))
    for module, names in NAMES.items():
        for name in names:
            delattr(module, name)
    subprocess.Popen.kill = subprocess.Popen.terminate  # as it is on Windows
    stat = os.stat

    def elsewhere(path, *args, **options):
        if isinstance(path, (str, Path)) and str(path).startswith(("/proc", "/dev/")):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return stat(path, *args, **options)

    os.stat = elsewhere


if __name__ == "__main__":
    move()
    sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))
