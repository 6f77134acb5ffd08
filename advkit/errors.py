"""What goes wrong when advkit is used on something it cannot work with.

Every message is one sentence or two: what was given, and what is allowed. The command line prints it and exits with 2.
"""


class UsageError(ValueError):
    """Something given to advkit (a setting, a file, data, a model) is not what it can work with."""


class AccessError(UsageError):
    """An attack asked for more than the adversary is allowed to see, or than the model can answer."""


class ModelError(UsageError):
    """The model raised, or answered with something that is not a batch of finite logits."""


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
