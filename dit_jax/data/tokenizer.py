"""From captions to the ids of a text encoder's vocabulary, by a `tokenizer.json` of Hugging Face's `tokenizers`.

That file is of any of its tokenizers: BERT's word pieces, CLIP's byte pairs, T5's unigrams. Captions come out at a
fixed length, so that nothing is compiled for each, with a mask of what is there. Those of training and those that are
drawn for are normalised alike (Unicode's NFC), wherever they were written. The package runs in a process of its own
(`tokenizer_process`): a file can make it crash, or take any time and memory.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_jax.config import MAX_CODES
from dit_jax.files import normalised

TOKENIZER_NAME = "tokenizer.json"
MAX_TOKENIZER_BYTES = 2**26  # multilingual T5's has 17 MB
# Of the process: bytes, and those more for each of the file; seconds of processor time to open it, and for a caption.
BASE_MEMORY, MEMORY_PER_BYTE = 2**30, 24
OPEN_SECONDS, CAPTION_SECONDS = 60.0, 5.0
PROGRAM = pathlib.Path(__file__).with_name("tokenizer_process.py")


class Tokenizer:
    """Captions to ids and masks [B, max_length]."""

    def __init__(self, folder: str | os.PathLike, max_length: int, vocab_size: int | None = None):
        """Reads the tokenizer in a folder.

        Args:
          folder: what holds `tokenizer.json`.
          max_length: tokens of a caption, those that begin and end it included.
          vocab_size: rows of the table that ids index; None: as many as there are.

        Raises:
          ValueError: where there is no tokenizer, or it does not fit.
        """
        path = pathlib.Path(folder) / TOKENIZER_NAME
        if not path.is_file():
            raise ValueError(f"{path}: no such file; it must be a folder with a tokenizer (launch/text_weights.sh)")
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise ValueError(f"{path} must be at most {MAX_TOKENIZER_BYTES:,} bytes, as tokenizers are; fetch it again")
        self._path, self._process, self._lock = path, None, threading.Lock()
        self.max_length = max_length
        facts = self._start()
        if "error" in facts:
            raise ValueError(f"{path} is no tokenizer of Hugging Face's form ({facts['error']}); fetch it again")
        self.vocab_size, num_special = facts["vocab_size"], facts["num_special"]
        if self.vocab_size > MAX_CODES:
            raise ValueError(f"{path} has ids up to {self.vocab_size - 1:,}, which no table here has rows for")
        if vocab_size is not None and self.vocab_size > vocab_size:
            raise ValueError(
                f"{path} has ids up to {self.vocab_size - 1:,}, but its text encoder has {vocab_size:,} rows; give the "
                "tokenizer that the encoder was trained with"
            )
        if max_length <= num_special:
            raise ValueError(
                f"{max_length=} tokens must be more than the {num_special} that begin and end a caption of {path}"
            )
        self._num_ids = vocab_size or self.vocab_size

    def tokenize(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns `ids` [B, max_length] int32 and `mask` [B, max_length] bool, False where a caption has ended.

        An empty caption is the null condition: its mask is all False. Of one that is too long the end is cut: `cut`
        tells what. Ids behind the end are 0.
        """
        ids = np.zeros((len(captions), self.max_length), np.int32)
        mask = np.zeros(ids.shape, bool)
        for i, caption in enumerate(captions):
            if caption.strip():
                tokens = self._encode(normalised(caption))["ids"]
                ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, True
        return {"ids": ids, "mask": mask}

    def cut(self, caption: str) -> str:
        """Returns the end of a caption that `tokenize` leaves out, as it is written; "" of one that fits."""
        caption = normalised(caption)
        encoding = self._encode(caption)
        return caption[encoding["end"] :].strip() if encoding["is_cut"] else ""

    def _encode(self, caption: str) -> dict[str, Any]:
        """Returns the `ids` of a caption, where it `end`s and whether it `is_cut` there.

        What no text holds, bytes of a command line, are "?".
        """
        encoding = self._ask(caption.encode("utf-8", "replace").decode())
        if "error" in encoding:
            raise ValueError(f"{self._path} cannot tokenize {caption[:80]!r} ({encoding['error']}); fetch it again")
        if max(encoding["ids"], default=0) >= self._num_ids:  # of those that begin and end a caption
            raise ValueError(
                f"{self._path} gives id {max(encoding['ids'])}, but has {self._num_ids} tokens; fetch it again"
            )
        return encoding

    def _ask(self, text: str) -> dict[str, Any]:
        """Returns the process's answer; the process is started anew where it has ended."""
        with self._lock:
            started = {} if self._process else self._start()
            return started if "error" in started else self._exchange(json.dumps(text) + "\n")

    def _start(self) -> dict[str, Any]:
        memory = BASE_MEMORY + MEMORY_PER_BYTE * self._path.stat().st_size
        numbers = [str(number) for number in (self.max_length, memory, OPEN_SECONDS, CAPTION_SECONDS)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(PROGRAM), str(self._path), *numbers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a panic is printed as well
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"},
            encoding="utf-8",
            start_new_session=True,  # a terminal's Ctrl-C is for this process
        )
        self._end = weakref.finalize(self, _end, self._process)
        return self._exchange("")

    def _exchange(self, line: str) -> dict[str, Any]:
        """Returns the process's next line, after it was given one; of a process that ended, its `error`."""
        answer = ""
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            if not answer.endswith("\n"):  # it ended, or this was interrupted: another line may come
                process, self._process = self._process, None
                self._end()
        if answer.endswith("\n"):
            return json.loads(answer)
        if process.returncode == -signal.SIGPROF:
            return {"error": f"it takes more than {CAPTION_SECONDS if line else OPEN_SECONDS} seconds"}
        return {"error": f"it takes too much memory, or ends what reads it with exit code {process.returncode}"}


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # a line that it did not read is lost
            pipe.close()
