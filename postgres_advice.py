"""What whoever starts the program is told of a database that cannot be opened, and what to do about it.

May not know connections. Words of the database's own are looked at and never repeated: they may hold a password.
"""

from __future__ import annotations

import os
import ssl
from typing import NamedTuple
from urllib.parse import parse_qsl

import asyncpg  # type: ignore[import-untyped]

from errors import StoreError
from postgres_errors import reason_of, refusal, store_error


class Advice(NamedTuple):
    """An error, by its class and words that are in it; the reason where that class alone says too little."""

    kind: type[BaseException]
    to_do: str
    words: str = ""
    reason: str = ""
    # None: as its class has it.
    is_passing: bool | None = None


TLS_FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl")
OPTIONS = "look at the options behind the '?' of the address"
WRITE_THE_ADDRESS = (
    "it is written postgresql://user@host:5432/database; a password with other signs than letters and digits belongs "
    "into PGPASSWORD"
)
# The first that fits. Source: postgresql.org/docs/current/errcodes-appendix.html, and connect_utils.py of asyncpg.
ADVICE = (
    Advice(
        asyncpg.InvalidAuthorizationSpecificationError,
        "look at the user in the address, at PGPASSWORD or PGPASSFILE, and at pg_hba.conf of the server",
    ),
    Advice(asyncpg.InvalidCatalogNameError, "make it with CREATE DATABASE, or correct the address"),
    Advice(
        asyncpg.InvalidSchemaNameError,
        "make it with CREATE SCHEMA, and let the user have USAGE of it, or correct its search_path",
    ),
    Advice(
        asyncpg.InsufficientPrivilegeError,
        "the user needs CONNECT on the database, CREATE and USAGE on the schema, and tables that are its own",
    ),
    Advice(asyncpg.TooManyConnectionsError, "raise its max_connections or the user's limit, or lower store.pool_size"),
    Advice(asyncpg.ReadOnlySQLTransactionError, "it is a standby, perhaps, or default_transaction_read_only is on"),
    Advice(asyncpg.UndefinedObjectError, OPTIONS, reason="has no setting of a name in its address", is_passing=False),
    Advice(
        asyncpg.CantChangeRuntimeParamError,
        OPTIONS,
        reason="does not let its address change a setting",
        is_passing=False,
    ),
    Advice(asyncpg.InvalidParameterValueError, OPTIONS, reason="refuses a setting in its address", is_passing=False),
    Advice(
        asyncpg.ProtocolViolationError,
        "behind PgBouncer set store.prepared_statements = false, or let it ignore what docs/state.md names",
    ),
    Advice(
        asyncpg.ClientConfigurationError,
        "name its file in PGSSLROOTCERT, or as sslrootcert in the address",
        "root certificate",
        "cannot be verified without a root certificate",
    ),
    Advice(
        asyncpg.ClientConfigurationError,
        "disable, allow, prefer, require, verify-ca or verify-full (PGSSLMODE, or sslmode in the address)",
        "`sslmode` parameter",
        "has an sslmode that does not exist",
    ),
    Advice(asyncpg.ClientConfigurationError, WRITE_THE_ADDRESS),
    Advice(
        ssl.SSLCertVerificationError,
        "look at the host in the address, and at PGSSLROOTCERT",
        is_passing=False,
    ),
    Advice(ssl.SSLError, "look at its certificate, and at PGSSLROOTCERT, PGSSLCERT and PGSSLKEY"),
    Advice(
        ConnectionError,
        "switch ssl on there, or choose another sslmode (PGSSLMODE)",
        "rejected SSL upgrade",
        "offers no TLS",
        is_passing=False,
    ),
    Advice(
        FileNotFoundError,
        "there is no socket in its folder, or no file of the names in PGSSLROOTCERT, PGSSLCERT and PGSSLKEY",
    ),
    Advice(
        PermissionError, "its socket, or a file of PGSSLROOTCERT, PGSSLCERT and PGSSLKEY, may not be read by this user"
    ),
    Advice(TimeoutError, "look at host and port, and for a firewall between"),
    Advice(OSError, "look whether it runs, and at host and port"),
    Advice(ValueError, WRITE_THE_ADDRESS),
)


def opening_error(error: BaseException, what: str) -> StoreError:
    """Why it cannot be opened, and what to do; without its cause, which may tell the address."""
    found = next((each for each in ADVICE if isinstance(error, each.kind) and each.words in str(error)), None)
    told = store_error(error, what)
    if found is not None:
        advised = refusal(f"{found.reason or reason_of(error)}: {found.to_do}", what)
        advised.is_passing = told.is_passing if found.is_passing is None else found.is_passing
        told = advised
    told.__cause__ = None
    return told


def refuse_lost_files(what: str, address: str) -> None:
    """Raises: StoreError. The connection would not tell it from a socket that is not there yet, and wait for that."""
    for name, value in parse_qsl(address.partition("?")[2]):
        if name in TLS_FILES and not os.path.isfile(value):
            raise StoreError(f"{what} cannot be reached: there is no file as its address names it in {name}.")
