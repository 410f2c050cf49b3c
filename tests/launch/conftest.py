"""What tests of the launch scripts share: an environment in which nothing is installed, and clients that pretend."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


class Shell:
    """Runs scripts with our own programs first on PATH; `calls` is what those wrote down, a line each."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.programs = folder / "programs"
        self.programs.mkdir()
        self.environment = os.environ | {
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "FAKE": str(folder),
            "HOME": str(folder),
            "PYTHONPATH": str(ROOT),
            "DIT_JAX_POLL_SECONDS": "0",
            "DIT_JAX_EXTRAS": "",
        }

    def program(self, name: str, text: str, folder: pathlib.Path | None = None) -> None:
        """Writes a bash program."""
        path = (folder or self.programs) / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)

    def hide_programs(self) -> None:
        """Leaves on PATH our own programs, and what a script needs to say that another is missing."""
        for name in ("bash", "dirname"):
            (self.programs / name).symlink_to(shutil.which(name))
        self.environment["PATH"] = str(self.programs)

    def start(self, script: str, *arguments: str, **popen) -> subprocess.Popen:
        """Starts `launch/SCRIPT` in the test's folder; its output is one stream."""
        return subprocess.Popen(
            [ROOT / "launch" / script, *map(str, arguments)],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Bash neither traps nor hands on a signal that it was started to ignore, as in the background it is.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            start_new_session=True,
            **popen,
        )

    def end(self, process: subprocess.Popen) -> None:
        """Kills a script that was started, and what it has started, where they are yet."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def run(self, script: str, *arguments: str, code: int = 0) -> str:
        """Returns what a script writes, which must end with an exit code within a quarter of an hour."""
        process = self.start(script, *arguments)
        try:
            output, _ = process.communicate(timeout=900)
        finally:
            self.end(process)
        assert process.returncode == code, output
        return output

    def calls(self) -> list[str]:
        """Returns the command lines that the pretending clients were called with."""
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def shell(tmp_path):
    """A shell in which the project counts as installed, with `dit-jax` from this checkout."""
    shell = Shell(tmp_path)
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    shell.program("python", f'exec {sys.executable} "$@"', programs)
    shell.program("dit-jax", f'exec {sys.executable} -m dit_jax "$@"', programs)
    command = "echo $PWD | cat - setup.py launch/constraints.txt | cksum"  # as launch/environment.sh does
    checksum = subprocess.run(["bash", "-c", command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    (tmp_path / "venv" / "dit_jax_installed").write_text(checksum + "\ngpu\ntpu\n")
    shell.environment["VIRTUAL_ENV"] = str(tmp_path / "venv")
    return shell
