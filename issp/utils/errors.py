"""Errors that the user can remedy; the command line prints them as one line.

`ValueError` and `OSError` count as the user's as well: checks of arguments and of files raise them.
A `TypeError` or `RuntimeError` that is not one of these classes is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator
from types import ModuleType


class UserError(Exception):
    """Base of the errors whose message is one sentence with a remedy."""


class ConfigError(UserError, ValueError):
    """A configuration, or what it asks for, cannot be used."""


class MissingPackageError(UserError, ImportError):
    """A package that an extra installs is not there.

    Args:
        purpose: what needs it, in the plural: the subject of the sentence.
        package: name that pip knows, such as "PyYAML".
        extra: of issp, which installs it.
    """

    def __init__(self, purpose: str, package: str, extra: str = "train") -> None:
        super().__init__(f'{purpose} need {package}: pip install "issp[{extra}]"')


class BackendError(UserError, RuntimeError):
    """The back end that the environment asks for cannot run here."""


class NonFiniteLossError(UserError, RuntimeError):
    """The training loss became NaN or infinite."""


class DivergedRanksError(UserError, RuntimeError):
    """The processes of one distributed training do not train the same network."""


class LostRankError(UserError, RuntimeError):
    """A process of a distributed training has ended without saying why."""


class InaccurateLayerError(UserError, RuntimeError):
    """A sparse layer computes something else than the dense one."""


class OutOfMemoryError(UserError, MemoryError):
    """The device, or the machine, has not enough memory."""


def import_optional(module: str, package: str, purpose: str) -> ModuleType:
    """A module of a package that the extra `train` installs.

    Args:
        module: what to import, such as "yaml".
        package, purpose: as in `MissingPackageError`.

    Raises:
        MissingPackageError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingPackageError(purpose, package) from None


def first_line(error: Exception) -> str:
    """The message of an error without the frames of native code that torch adds to some."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException) -> str:
    """The message of an error in one line, without the number that the system has for it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"^\[Errno \d+\] ", "", text)


@contextlib.contextmanager
def explain_out_of_memory(remedy: str) -> Iterator[None]:
    """Turns torch's and Python's errors of a failed allocation into one sentence.

    Args:
        remedy: what the user can do, such as "use --tile".

    Raises:
        OutOfMemoryError: an allocation inside failed.
    """
    import torch

    try:
        yield
    except OutOfMemoryError:
        raise  # its remedy is the nearer one
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(f"the GPU has not enough memory: {remedy}") from error
    except MemoryError as error:
        raise OutOfMemoryError(f"the machine has not enough memory: {remedy}") from error
    except RuntimeError as error:
        # torch's CPU allocator has no class of its own for this.
        if "can't allocate memory" not in str(error):
            raise
        raise OutOfMemoryError(f"the machine has not enough memory: {remedy}") from error
