"""What errors of PostgreSQL mean: what clients are told of them, and which ones say that it is away.

May not know statements or tables. No message tells the address of the database, which may hold a password.
"""

from __future__ import annotations

import ssl

import asyncpg  # type: ignore[import-untyped]

from errors import StoreError

RETRY_AFTER_S = 1.0
STORE = "The store of responses"
# Classes of errors -> what to say of them; the first that fits.
# Source: postgresql.org/docs/current/errcodes-appendix.html, and asyncpg's exceptions.
REASONS: tuple[tuple[type[BaseException], str], ...] = (
    (asyncpg.InvalidAuthorizationSpecificationError, "refuses the user or the password"),
    (asyncpg.InvalidCatalogNameError, "has no database of that name"),
    (asyncpg.InvalidSchemaNameError, "has no schema of the name in its address"),
    (asyncpg.InsufficientPrivilegeError, "may not be read or written by this user"),
    (asyncpg.TooManyConnectionsError, "takes no more connections"),
    (asyncpg.DiskFullError, "has no space left on its disk"),
    (asyncpg.ReadOnlySQLTransactionError, "may not be written"),
    (asyncpg.UndefinedTableError, "has lost its tables"),
    (asyncpg.QueryCanceledError, "takes too long"),
    (asyncpg.LockNotAvailableError, "is locked by another process"),
    (asyncpg.CannotConnectNowError, "is starting or stopping"),
    (asyncpg.AdminShutdownError, "is stopping"),
    (asyncpg.CrashShutdownError, "is stopping"),
    (asyncpg.ProtocolViolationError, "or a pooler before it refuses how this connection begins"),
    (asyncpg.PostgresConnectionError, "has lost its connection"),
    (asyncpg.ClientConfigurationError, "has an address that cannot be understood"),
    (asyncpg.InterfaceError, "has lost its connection"),
    (asyncpg.InternalClientError, "has lost its connection"),
    (TimeoutError, "does not answer in time"),
    (ssl.SSLCertVerificationError, "has a certificate that is not trusted, or is that of another host"),
    (ssl.SSLError, "fails at TLS"),
    (OSError, "cannot be reached"),
    (ValueError, "has an address that cannot be understood"),
)
BUSY = "has no free connection"
FAILURES = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
# After these nobody knows whether the statement was carried out: its connection is gone.
LOST = (
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)
# Not to be mended by waiting: somebody has to change something.
LASTING = (
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InvalidSchemaNameError,
    asyncpg.InsufficientPrivilegeError,
    asyncpg.ClientConfigurationError,
    ValueError,
)
# Two statements met: what one of them has read is not so any more. Tried again, it sees what the other one did.
RACES = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError, asyncpg.ForeignKeyViolationError)
RACED_CONSTRAINTS = frozenset({"turn_place"})


class Unheard(StoreError):
    """The connection broke after something was sent: it was carried out, or it was not."""

    is_unsure = True


def reason_of(error: BaseException) -> str:
    """Without a word of the database's own, which may quote what was sent."""
    return next((reason for kind, reason in REASONS if isinstance(error, kind)), f"failed ({type(error).__name__})")


def refusal(reason: str, what: str = STORE) -> StoreError:
    error = StoreError(f"{what} {reason}.")
    error.retry_after_s = RETRY_AFTER_S
    return error


def store_error(error: BaseException, what: str = STORE) -> StoreError:
    """What a client is told of an error of PostgreSQL; the cause is kept."""
    told = refusal(reason_of(error), what)
    told.is_passing = not isinstance(error, LASTING)
    told.__cause__ = error
    return told


def unheard(error: BaseException) -> Unheard:
    told = Unheard(f"{STORE} {reason_of(error)}; whether it has kept what it was given is not known.")
    told.retry_after_s = RETRY_AFTER_S
    return told


def is_race(error: BaseException) -> bool:
    if isinstance(error, asyncpg.UniqueViolationError):
        return error.constraint_name in RACED_CONSTRAINTS
    return isinstance(error, RACES)
