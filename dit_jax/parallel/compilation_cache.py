"""Compiled programs that outlive the process: JAX's persistent compilation cache, as the config asks for it."""

import os
import pathlib
import re
import sys
import tempfile
import warnings

import jax

from dit_jax.files import print_warning, user_path
from dit_jax.terminal import silence_libtpu

DIRECTORY, MIN_SECONDS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"


_show = warnings.showwarning
_untold = True


def _tell_once() -> None:
    """Makes JAX's warnings of a cache that cannot be written, one a program, a single line."""

    def show(message, *args, **kwargs) -> None:
        global _untold
        text = str(message)
        if not re.match("Error (writing|reading) persistent compilation cache", text):
            _show(message, *args, **kwargs)
        elif _untold:
            _untold = False
            print_warning(f"warning: {jax.config.jax_compilation_cache_dir}: {' '.join(text.split())}; so are others")

    warnings.showwarning = show


def use_compilation_cache(directory: str | None) -> str | None:
    """Makes JAX keep what it compiles in a folder (None: nowhere), unless the environment names another; returns it.

    To be called before anything is compiled. A folder that cannot be written costs a line, and never the run.
    """
    silence_libtpu()
    _tell_once()
    if DIRECTORY.upper() in os.environ:
        return os.environ[DIRECTORY.upper()] or None
    if MIN_SECONDS.upper() not in os.environ:
        jax.config.update(MIN_SECONDS, 0.0)  # hundreds of small programs run before the first step, too: keep all
    if directory is not None:
        try:
            directory = pathlib.Path(user_path(directory))
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except (OSError, ValueError) as error:  # of the disk, or of a home folder that is not known
            reason = getattr(error, "strerror", None) or error
            print(
                f"config.compute.compilation_cache={directory} cannot be written ({reason}): "
                "everything is compiled anew at each start",
                file=sys.stderr,
                flush=True,
            )
            directory = None
    directory = directory and str(directory)
    jax.config.update(DIRECTORY, directory)
    return directory
