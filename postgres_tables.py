"""The tables of the store on PostgreSQL, with their units, and the numbered migrations that lead to them.

May not know what a turn or an item means. The tables stand in the first schema of the connection's search_path.
Source: postgresql.org/docs/current/sql-createtable.html, xfunc-volatility.html.
"""

from __future__ import annotations

# Of pg_advisory_xact_lock: one process migrates at a time, one admits, one makes things unknown.
MIGRATING, ADMITTING, FORGETTING = 0x5270_5278_01, 0x5270_5278_02, 0x5270_5278_03

# What of an id has room in an index.
HEAD = "left({}, 600)"
# In the order in which they are made.
TABLES = (
    *("secret", "settings", "thread", "conversation", "turn", "item", "lease", "first_use", "learned", "account"),
    *("run", "queue", "log", "event"),
)

# Said so, a condition follows from no other: an index with it serves only statements that say the same. Otherwise, of a
# table without statistics, that index seems to hold nearly nothing, and one row is looked for by reading all of it.
LISTED_TURN = "(turn.id IS NOT NULL AND turn.deleted_at IS NULL) IS TRUE"
QUEUED_RUN = "(run.holder IS NULL) IS TRUE"

SCHEMA_1 = (
    "CREATE TABLE secret (name text PRIMARY KEY, value bytea NOT NULL)",
    # What the responses of a chain share, kept once.
    """CREATE TABLE settings (
        digest bytea PRIMARY KEY,  -- BLAKE2b, 16 bytes, of owner, model and body
        model text NOT NULL,
        body bytea NOT NULL)       -- JSON""",
    # A line of turns. A fork names the turn that it leaves. Who wants to go on from the tip moves it: of two, one can.
    """CREATE TABLE thread (
        seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        parent bigint,             -- thread
        parent_depth bigint,
        tip bigint NOT NULL,       -- depth of its newest turn; -1: none yet
        is_conversation boolean NOT NULL)""",
    "CREATE INDEX thread_by_parent ON thread (parent, parent_depth) WHERE parent IS NOT NULL",
    """CREATE TABLE conversation (
        id text PRIMARY KEY,
        owner text NOT NULL,
        thread bigint NOT NULL,
        created_at bigint NOT NULL,  -- Unix seconds
        metadata bytea NOT NULL)""",
    # A response, or items that a client put into a conversation. Depth goes on from the parent thread's.
    """CREATE TABLE turn (
        seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        id text UNIQUE,            -- of the response; NULL: items put in by a client
        owner text NOT NULL,
        thread bigint NOT NULL,
        depth bigint NOT NULL,
        previous bigint,           -- turn that previous_response_id named
        settings bytea REFERENCES settings,
        status text NOT NULL,
        created_at bigint NOT NULL,    -- Unix seconds, as the next four
        completed_at bigint,
        deleted_at bigint,
        ages_from bigint,          -- NULL: a conversation holds it
        lives_until double precision,  -- of a short-lived response, infinite while it runs; NULL: all others
        compaction integer,        -- place of the newest compaction item
        body bytea NOT NULL,       -- JSON
        ahead bytea,               -- stands for the window that ends with the turn
        CONSTRAINT turn_place UNIQUE (thread, depth))""",
    f"CREATE INDEX turn_by_owner ON turn (owner, seq) WHERE {LISTED_TURN}",
    "CREATE INDEX turn_by_age ON turn (ages_from) WHERE ages_from IS NOT NULL AND deleted_at IS NULL",
    "CREATE INDEX turn_by_life ON turn (lives_until) WHERE lives_until IS NOT NULL",
    "CREATE INDEX turn_by_settings ON turn (settings) WHERE settings IS NOT NULL",
    "CREATE INDEX turn_by_compaction ON turn (thread, depth) WHERE compaction IS NOT NULL",
    # Input has the lower half of the places, output the upper: see schema.OUTPUTS_AT.
    """CREATE TABLE item (
        turn bigint NOT NULL REFERENCES turn ON DELETE CASCADE,
        place integer NOT NULL,
        kind smallint NOT NULL,       -- 0: listed, 1: not listed, 2: compaction, 3: nor in a window
        is_removed boolean NOT NULL DEFAULT false,  -- taken out of its conversation
        is_foreign boolean NOT NULL,  -- its id does not tell its response: see verbs.response_of
        id text NOT NULL,
        body bytea NOT NULL,          -- JSON
        PRIMARY KEY (turn, place))""",
    # Clients choose these ids: they may be longer than what a tree takes, and the same in many turns.
    f"CREATE INDEX item_by_id ON item ({HEAD.format('id')}) WHERE is_foreign",
    """CREATE TABLE lease (
        name text PRIMARY KEY, holder text NOT NULL, until_at double precision NOT NULL)""",
    "CREATE INDEX lease_by_holder ON lease (holder)",
    """CREATE TABLE first_use (
        owner text, key text, digest bytea NOT NULL, response text NOT NULL, until_at bigint NOT NULL,
        PRIMARY KEY (owner, key))""",
    "CREATE TABLE learned (name text PRIMARY KEY, value bytea NOT NULL)",
    # What an owner has used, and whether it was granted what was last wished for. Not in the write-ahead log: after a
    # crash of the database every owner begins anew, and no admission waits for its disk.
    """CREATE UNLOGGED TABLE account (
        owner text PRIMARY KEY,
        requests_at double precision NOT NULL DEFAULT 0,  -- Unix seconds: when all of it is there again
        tokens_at double precision NOT NULL DEFAULT 0,    -- likewise
        took_s double precision NOT NULL DEFAULT 0,       -- how long the last request in flight took
        flights jsonb NOT NULL DEFAULT '{}',              -- name of a holder's lease -> its requests in flight
        is_granted boolean NOT NULL DEFAULT false)""",
    # A background turn that has not ended. A run that goes wakes who waits for it, also who began to only now.
    """CREATE TABLE run (
        seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        turn bigint REFERENCES turn ON DELETE SET NULL,
        owner text NOT NULL,
        conversation text,
        request bytea NOT NULL,    -- JSON, without its input, which is the turn's
        bearer text,               -- the client's own key, sealed
        admitted_at double precision NOT NULL,  -- Unix seconds
        waits_for bigint REFERENCES run ON DELETE SET NULL,  -- run that has to end before
        holder text,               -- the process that carries it out; NULL: queued
        until_at double precision, -- Unix seconds: end of the holder's lease
        generation integer NOT NULL DEFAULT 0,  -- grows with every claim
        attempts integer NOT NULL DEFAULT 0,
        next_number bigint,        -- of the next event; NULL: no events are kept
        is_stopped boolean NOT NULL DEFAULT false)  -- its holder has to let go, and that is all that is left of it""",
    "CREATE INDEX run_ready ON run (owner, seq) WHERE holder IS NULL AND waits_for IS NULL",
    f"CREATE INDEX run_queued ON run (owner) WHERE {QUEUED_RUN}",
    "CREATE INDEX run_by_holder ON run (holder) WHERE holder IS NOT NULL",
    "CREATE INDEX run_by_turn ON run (turn)",
    "CREATE INDEX run_by_waits_for ON run (waits_for) WHERE waits_for IS NOT NULL",
    "CREATE INDEX run_by_conversation ON run (conversation) WHERE conversation IS NOT NULL",
    # When in the round an owner's last run was taken. Every owner who has runs has a row, and perhaps others.
    "CREATE TABLE queue (owner text PRIMARY KEY, served bigint NOT NULL)",
    "CREATE INDEX queue_by_served ON queue (served)",
    "CREATE SEQUENCE round",
    # The events of a streamed run can be read until then; infinite while it runs.
    "CREATE TABLE log (run bigint PRIMARY KEY, turn bigint NOT NULL, until_at double precision NOT NULL)",
    "CREATE INDEX log_by_turn ON log (turn)",
    "CREATE INDEX log_by_end ON log (until_at)",
    # Some events that follow each other, as clients are sent them.
    "CREATE TABLE event (run bigint, first bigint, body bytea NOT NULL, PRIMARY KEY (run, first))",
    # A server that was built without it keeps the compression that it has, which takes several times as long.
    """DO $$ BEGIN
        ALTER TABLE settings ALTER body SET COMPRESSION lz4; ALTER TABLE item ALTER body SET COMPRESSION lz4;
        ALTER TABLE run ALTER request SET COMPRESSION lz4; ALTER TABLE event ALTER body SET COMPRESSION lz4;
        ALTER TABLE turn ALTER body SET COMPRESSION lz4, ALTER ahead SET COMPRESSION lz4;
        EXCEPTION WHEN feature_not_supported THEN NULL; END $$""",
    # A volatile function sees what was committed before its second query, and not only before the statement that calls
    # it: so the lengths are those that hold until the caller commits, and one statement both asks and admits. In this
    # language its queries are planned once for a connection, and not with each call.
    f"""CREATE FUNCTION line_of(of_owner text, of_conversation text, at_most bigint)
        RETURNS TABLE (own bigint, total bigint, before bigint) LANGUAGE plpgsql VOLATILE AS $$ BEGIN
        PERFORM pg_advisory_xact_lock({ADMITTING});
        RETURN QUERY SELECT (SELECT count(*) FROM run WHERE run.owner = of_owner AND {QUEUED_RUN}),
            (SELECT count(*) FROM (SELECT FROM run WHERE {QUEUED_RUN} LIMIT at_most) AS counted),
            (SELECT max(seq) FROM run WHERE conversation = of_conversation AND run.owner = of_owner AND NOT is_stopped);
        END $$""",
)

# The statements at index n bring the tables from version n to n + 1.
MIGRATIONS: tuple[tuple[str, ...], ...] = (SCHEMA_1,)

# Of any schema: whose it is, and its version.
# Added to the version of tables into which another store is being copied: no version of the program takes them.
COPYING = 1_000_000
VERSION_TABLE = "CREATE TABLE responses_proxy (version integer NOT NULL)"
HAS_VERSION = "SELECT to_regclass('responses_proxy') IS NOT NULL"
