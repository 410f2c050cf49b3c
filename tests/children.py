"""What a script does where a program that it has started fails: it ends, and shows what the program said last."""

LAST_LINES = 30


def child_error(what: str, code: int | None, output: str) -> SystemExit:
    """Returns what a script raises: it then exits with 1, and says which program ended with what code and words."""
    lines = output.rstrip().splitlines()[-LAST_LINES:] or ["(it said nothing)"]
    return SystemExit("\n".join([f"error: {what} ended with code {code}; its last lines:", *lines]))
