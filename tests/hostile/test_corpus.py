"""Whatever a file on the command line holds: no code of it runs, one line says what is wrong, nothing is written."""

import pathlib
import resource

import pytest

from dit_jax.cli.main import main
from tests.hostile import corpus

KINDS = (corpus.weights, corpus.pickled_archives, corpus.diffusers_folders, corpus.configs, corpus.workdirs)
MAX_GROWTH = 2**30  # bytes that the peak of this process's memory may grow by over a kind, imports included


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_hostile_file_is_one_clear_error(kind, tmp_path, capsys):
    folder, place = tmp_path / "files", tmp_path / "place"
    folder.mkdir(), place.mkdir()
    canary = tmp_path / "canary"
    before, count = peak_memory(), 0
    for name, arguments in kind(folder, canary, place / "output"):
        outcome = run(arguments, capsys)
        assert outcome is None, f"{name}: dit-jax {' '.join(arguments)}: {outcome}"
        assert not canary.exists(), f"{name} ran code"
        written = [str(path) for path in place.rglob("*") if path.is_file()]
        assert not written, f"{name} left {written}"
        count += 1
    assert count > 5
    assert peak_memory() - before < MAX_GROWTH


def run(arguments: list[str], capsys) -> str | None:
    """Runs the program in this process; returns what it did other than to end with one line and the code 2."""
    try:
        main(arguments)
    except SystemExit as stopped:
        error = capsys.readouterr().err.strip()
        if stopped.code != 2 or not error.startswith(f"dit-jax {arguments[0]}: error: ") or "\n" in error:
            return f"exit code {stopped.code}, {error[:500]!r}"
        return f"a line of {len(error):,} letters" if len(error) > 2000 else None
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:500]}"
    return "no error"


def peak_memory() -> int:
    """Returns the most bytes that this process has had in memory so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_what_would_run_does_run_where_it_is_let(tmp_path):
    """The canary sings: else the corpus could not fail."""
    import pickle

    pickle.loads(pickle.dumps(corpus.Runs(tmp_path / "canary")))
    assert pathlib.Path(tmp_path / "canary").exists()
