"""What owners have used, on PostgreSQL.

May not know what a limit is, nor what is limited. A charge is one statement, which decides on the newest row: it waits
for whoever charges the same owner. Source: postgresql.org/docs/current/transaction-iso.html, read committed.
"""

from __future__ import annotations

from typing import Any

import msgspec

from postgres_pool import Asked, Statement
from quota_verbs import Charge, Used

NOW = ":now::double precision"
# With its lease gone a holder is gone, and with it all that it had in flight.
ELSEWHERE = f"""(SELECT coalesce(sum(held.value::integer), 0)::integer FROM jsonb_each_text(account.flights) AS held
        JOIN lease ON lease.name = held.key AND lease.until_at > {NOW} WHERE held.key <> :holder::text)"""
TIMES = f"""SELECT greatest(account.requests_at, {NOW}) AS requests_at,
        greatest(account.tokens_at, {NOW}) + :tokens_s::double precision AS tokens_at"""
GRANTED = f"""SELECT :has_wish::boolean AND times.requests_at - {NOW} <= :most_requests_s::double precision
        AND times.tokens_at - {NOW} <= :most_tokens_s::double precision
        AND (:most_in_flight::integer IS NULL OR {ELSEWHERE} + :in_flight::integer < :most_in_flight::integer) AS it"""
HELD = "SELECT :in_flight::integer + (granted.it AND :most_in_flight::integer IS NOT NULL)::integer AS requests"
CHARGE = Statement(
    f"""UPDATE account SET (requests_at, tokens_at, took_s, flights, is_granted) = (
        SELECT CASE WHEN granted.it THEN times.requests_at + :requests_s::double precision ELSE times.requests_at END,
            times.tokens_at, coalesce(:took_s::double precision, account.took_s),
            CASE WHEN held.requests > 0 THEN account.flights || jsonb_build_object(:holder::text, held.requests)
                ELSE account.flights - :holder::text END, granted.it
        FROM ({TIMES}) AS times, LATERAL ({GRANTED}) AS granted, LATERAL ({HELD}) AS held)
    WHERE owner = :owner RETURNING is_granted, requests_at, tokens_at, {ELSEWHERE} AS elsewhere, took_s"""
)
OPEN = Statement("INSERT INTO account (owner) VALUES (:owner) ON CONFLICT DO NOTHING")
# What is as good as no account at all.
SWEEP = Statement(
    f"""DELETE FROM account WHERE requests_at <= {NOW} AND tokens_at <= {NOW} AND NOT EXISTS (
        SELECT FROM jsonb_each_text(account.flights) AS held
        JOIN lease ON lease.name = held.key AND lease.until_at > {NOW})"""
)


def without_cost(charge: Charge) -> Charge:
    """What is still to be told of a charge that may be on the account already."""
    most_requests_s = charge.most_requests_s + charge.requests_s
    return msgspec.structs.replace(charge, tokens_s=0.0, requests_s=0.0, most_requests_s=most_requests_s)


async def charge(db: Asked, charge: Charge) -> Used:
    values: dict[str, Any] = msgspec.structs.asdict(charge)
    while (row := await db.row(CHARGE, values)) is None:
        await db.rows(OPEN, {"owner": charge.owner})
    return Used(*row.values())
