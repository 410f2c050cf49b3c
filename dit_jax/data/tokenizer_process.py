"""A process that tokenizes for `data.tokenizer`, run as a program of its own: it may crash, and is bounded.

    python -P tokenizer_process.py TOKENIZER.JSON MAX_LENGTH MEMORY OPEN_SECONDS SECONDS

The package `tokenizers` believes its file: it panics, ends the process or takes any time and memory where the file
says so. The first line written tells of the tokenizer, then each line read, a text, is answered by one; all are JSON.
Whatever takes more processor time or memory than allowed ends the process.
"""

import contextlib
import json
import resource
import signal
import sys


def main(path: str, max_length: str, memory: str, *seconds: str) -> None:
    """Answers until its input ends."""
    for name in ("SIGINT", "SIGTERM"):  # meant for the parent, whose end is that of the input
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    with contextlib.suppress(ValueError, OSError):  # a system without it
        resource.setrlimit(resource.RLIMIT_AS, (int(memory), int(memory)))

    def opened():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(path)
        tokenizer.no_padding()
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        num_special = tokenizer.num_special_tokens_to_add(is_pair=False)
        if num_special < int(max_length):
            tokenizer.enable_truncation(int(max_length), direction="right")
        return tokenizer, {"vocab_size": max(vocabulary.values(), default=-1) + 1, "num_special": num_special}

    def encoded(text: str) -> dict:
        encoding = tokenizer.encode(text)
        end = max((end for _, end in encoding.offsets), default=0)
        return {"ids": encoding.ids, "end": end, "is_cut": bool(encoding.overflowing)}

    def answer(function, limit: str, *inputs):
        value, outcome = None, {}
        signal.setitimer(signal.ITIMER_PROF, float(limit))  # its signal ends the process
        try:
            value = function(*inputs)
        except BaseException as error:  # a panic is no Exception
            outcome = {"error": f"{error}"[:1000] or type(error).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        return value, outcome

    def say(outcome: dict) -> None:
        print(json.dumps(outcome), flush=True)

    found, failure = answer(opened, seconds[0])
    tokenizer, facts = found or (None, failure)
    say(facts)
    for line in sys.stdin:
        found, failure = answer(encoded, seconds[1], json.loads(line))
        say(found or failure)


if __name__ == "__main__":
    main(*sys.argv[1:])
