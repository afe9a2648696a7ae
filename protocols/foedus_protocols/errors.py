"""The exception tree, and the exit code of each branch.

    FoedusError                1  anything that went wrong and has no better name
    ├── UsageError             2  the command line cannot be understood or misses an answer
    ├── ConfigError            3  a configuration, policy or charter file is malformed
    ├── ConnectError           4  the other side cannot be reached, or its TLS identity does not check out
    ├── PolicyRefused          5  the organisation's policy or a charter check says no (carries the step's number)
    ├── BudgetExhausted        6  the privacy budget does not cover what was asked
    ├── VerificationError      7  a signature, digest, certificate or sequence is wrong
    ├── DataError              8  a data file cannot be read or is not what it was declared to be
    ├── CheckpointError        9  a model or adapter file is missing, truncated, of another shape, or a pickle
    ├── PrivacyCheckFailed    10  a sensitivity, noise or coverage check failed: nothing private was released
    ├── RoundFailed           11  a round or run ended without a result
    ├── StateError            12  the state on disk does not allow this (used token, unknown run, second daemon)
    └── MissingExtra          13  the part of Foedus that does this is not installed

A message says what was expected, what came, and what to do. It never holds a record, a prompt, a key or a token.
Every exit code has a section in ``docs/exit-codes.md``; a test keeps the two in step.
"""

from __future__ import annotations

from typing import ClassVar


class FoedusError(Exception):
    """Base of every error that a Foedus command reports in one line."""

    exit_code: ClassVar[int] = 1


class UsageError(FoedusError):
    """The command line cannot be understood or misses an answer."""

    exit_code = 2


class ConfigError(FoedusError):
    """A configuration, policy or charter file is malformed."""

    exit_code = 3


class ConnectError(FoedusError):
    """The other side cannot be reached, or its TLS identity does not check out."""

    exit_code = 4


class PolicyRefused(FoedusError):
    """The organisation's policy, or a numbered check of a charter, says no.

    Attributes:
        step: The number of the failed check (``docs/protocol.md``). It is all that leaves the organisation.
    """

    exit_code = 5

    def __init__(self, step: int, message: str) -> None:
        super().__init__(f"check {step}: {message}")
        self.step = step


class BudgetExhausted(PolicyRefused):
    """The privacy budget does not cover what was asked (check 10)."""

    exit_code = 6


class VerificationError(FoedusError):
    """A signature, digest, certificate or sequence is wrong."""

    exit_code = 7


class DataError(FoedusError):
    """A data file cannot be read or is not what it was declared to be."""

    exit_code = 8


class CheckpointError(FoedusError):
    """A model or adapter file is missing, truncated, of another shape or type, or a pickle."""

    exit_code = 9


class PrivacyCheckFailed(FoedusError):
    """A sensitivity, noise or coverage check failed; nothing private was released."""

    exit_code = 10


class RoundFailed(FoedusError):
    """A round or a run ended without a result."""

    exit_code = 11


class StateError(FoedusError):
    """The state on disk does not allow this."""

    exit_code = 12


class MissingExtra(FoedusError):
    """The part of Foedus that does this is not installed."""

    exit_code = 13
