"""How `make gpu-check` runs its steps. (Its dry run shows that each of them runs.)"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

SLOW = "import time; print('began', flush=True); time.sleep(60)"
DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); " + SLOW
WRITES = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {DEAF!r}], stdout=subprocess.PIPE)
print(child.stdout.readline(), child.pid, flush=True)
try:
    child.wait()
except KeyboardInterrupt:
    print("wrote", child.pid)
"""


def test_a_step_at_its_limit_leaves_what_it_has(tmp_path, monkeypatch, request):
    """All of its commands are interrupted at once, and their children ended with them."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])  # (bench is not installed)
    from bench.gpu import __main__ as gpu_check

    monkeypatch.setattr(gpu_check, "GRACE", 3)  # (a busy machine takes a while to write)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    check = gpu_check.Check(tmp_path, dry=False)
    commands = [[sys.executable, "-c", code] for code in (DEAF, WRITES, "print('fine')", DEAF)]
    lasts = check.run("tests", 4, *commands)
    (step,) = check.steps
    assert (step.result, step.reason) == ("failed", "stopped after its 4 s: began")
    assert step.seconds < 4 + 3 + 3
    assert [last.split()[0] for last in lasts] == ["began", "wrote", "fine", "began"]
    assert (tmp_path / "gpu.log").read_text().count("stopped after its 4 s") == 3
    child = int(lasts[1].split()[1])
    until = time.monotonic() + 20  # (a killed process takes a while to end on a busy machine)
    while runs(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not runs(child)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
