"""From captions to the ids of a text encoder's vocabulary, by a `tokenizer.json` of Hugging Face's `tokenizers`.

That file is of any of its tokenizers: BERT's word pieces, CLIP's byte pairs, T5's unigrams. Captions come out at a
fixed length, so that nothing is compiled for each, with a mask of what is there. Those of training and those that are
drawn for are normalised alike (Unicode's NFC), wherever they were written.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_jax.files import normalised

TOKENIZER_NAME = "tokenizer.json"
MAX_TOKENIZER_BYTES = 2**26  # multilingual T5's has 17 MB


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
        from tokenizers import Tokenizer  # takes a tenth of a second, which runs without text need not pay

        path = pathlib.Path(folder) / TOKENIZER_NAME
        if not path.is_file():
            raise ValueError(f"{path}: no such file; it must be a folder with a tokenizer (launch/text_weights.sh)")
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise ValueError(f"{path} must be at most {MAX_TOKENIZER_BYTES:,} bytes, as tokenizers are; fetch it again")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
            self._tokenizer.no_padding()
        except Exception as error:  # the package raises this very type
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} is no tokenizer of Hugging Face's form ({reason}); fetch it again") from error
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if vocab_size is not None and self.vocab_size > vocab_size:
            raise ValueError(
                f"{path} has ids up to {self.vocab_size - 1:,}, but its text encoder has {vocab_size:,} rows; give the "
                "tokenizer that the encoder was trained with"
            )
        num_special = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        if max_length <= num_special:
            raise ValueError(
                f"{max_length=} tokens must be more than the {num_special} that begin and end a caption of {path}"
            )
        self.max_length, self._path, self._num_ids = max_length, path, vocab_size or self.vocab_size
        self._tokenizer.enable_truncation(max_length, direction="right")

    def tokenize(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns `ids` [B, max_length] int32 and `mask` [B, max_length] bool, False where a caption has ended.

        An empty caption is the null condition: its mask is all False. Of one that is too long the end is cut: `cut`
        tells what. Ids behind the end are 0.
        """
        ids = np.zeros((len(captions), self.max_length), np.int32)
        mask = np.zeros(ids.shape, bool)
        for i, caption in enumerate(captions):
            if caption.strip():
                tokens = self._encode(normalised(caption)).ids
                ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, True
        return {"ids": ids, "mask": mask}

    def cut(self, caption: str) -> str:
        """Returns the end of a caption that `tokenize` leaves out, as it is written; "" of one that fits."""
        caption = normalised(caption)
        encoding = self._encode(caption)
        if not encoding.overflowing:
            return ""
        return caption[max(end for _, end in encoding.offsets) :].strip()

    def _encode(self, caption: str) -> Any:
        """Returns the package's encoding of a caption, with "?" for what no text holds: bytes of a command line."""
        try:
            encoding = self._tokenizer.encode(caption.encode("utf-8", "replace").decode())
        except Exception as error:  # as above: of a file that has no token for what it does not know
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{self._path} cannot tokenize {caption[:80]!r} ({reason}); fetch it again") from error
        if max(encoding.ids, default=0) >= self._num_ids:  # of those that begin and end a caption
            raise ValueError(
                f"{self._path} gives id {max(encoding.ids)}, but has {self._num_ids} tokens; fetch it again"
            )
        return encoding
