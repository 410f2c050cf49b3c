"""What the processes of a run tell each other when they save and restore, so that all do the same about a failure.

Through JAX's coordination service and not by collectives: a thread that saves may start none, since those of the
training step are under way.
"""

import collections
import json

from jax._src import distributed  # jax.distributed has no public access to the service's keys

TIMEOUT_SECONDS = 3600  # that all wait for the slowest to write its part of a checkpoint

_rounds: collections.Counter[str] = collections.Counter()  # how often this process has called `agree`, by channel


def is_first() -> bool:
    """Returns whether this is the process that does what only one should."""
    return distributed.global_state.process_id == 0


def share_of_processes() -> tuple[int, int]:
    """Returns this process's number, and how many there are: of things in a row it takes `row[number::count]`."""
    state = distributed.global_state
    return (0, 1) if state.client is None else (state.process_id, state.num_processes)


def agree(channel: str, value: str) -> list[str]:
    """Returns the values of all processes, in their order, once each has called this as often on the channel."""
    client, (process, count) = distributed.global_state.client, share_of_processes()
    if count == 1:
        return [value]
    number = _rounds[channel]
    _rounds[channel] += 1
    key, timeout = f"dit_jax/agree/{channel}/{number}", TIMEOUT_SECONDS * 1000
    if process != 0:
        client.key_value_set(f"{key}/{process}", value)
        return json.loads(client.blocking_key_value_get(f"{key}/all", timeout))
    values = [value] + [client.blocking_key_value_get(f"{key}/{other}", timeout) for other in range(1, count)]
    client.key_value_set(f"{key}/all", json.dumps(values))
    if number:  # whoever is in this round has read the one before it
        client.key_value_delete(f"dit_jax/agree/{channel}/{number - 1}/")
    return values


def first_error(channel: str, error: str) -> str:
    """Returns the first error that a process had, with its number if there are several; "" where all had none."""
    return name_first(agree(channel, error))


def name_first(errors: list[str]) -> str:
    """Returns the first error of the processes' as `first_error` does."""
    for process, text in enumerate(errors):
        if text:
            return f"process {process}: {text}" if len(errors) > 1 else text
    return ""
