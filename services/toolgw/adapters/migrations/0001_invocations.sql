-- Tool calls under their idempotency keys, the runners that work on them, and the notes that sessions keep.

CREATE SCHEMA IF NOT EXISTS toolgw;

-- Row-level security: the caller states in `soma.tenants` which tenants its transaction is about, as a comma list or `*`.
-- Not set, it is about none.
CREATE FUNCTION toolgw.may_touch(tenant text) RETURNS boolean
    LANGUAGE sql STABLE
    RETURN current_setting('soma.tenants', true) = '*'
        OR tenant = ANY (string_to_array(current_setting('soma.tenants', true), ','));

-- One row per process of the tool gateway: it lives until `expire_time`. Belongs to no tenant.
CREATE TABLE toolgw.runners (
    runner      uuid        PRIMARY KEY, -- made at the start of the process
    instance    text        NOT NULL,
    expire_time timestamptz NOT NULL
);

CREATE TABLE toolgw.invocations (
    tenant      text COLLATE "C" NOT NULL,
    key         text COLLATE "C" NOT NULL,
    session_id  bytea       NOT NULL, -- 16 bytes, derived from the session key
    tool        text        NOT NULL, -- empty: cancelled before the call came
    digest      bytea,                -- of session, tool and arguments; null: cancelled before the call came
    effect      text        NOT NULL CHECK (effect IN ('none', 'with_result', 'idempotent', 'side_effectful')),
    state       text        NOT NULL CHECK (state IN ('running', 'done', 'cancelled', 'unknown')),
    claim       uuid,                 -- of the attempt that made it running; every way out of `running` names it
    runner      uuid,                 -- null: nobody works on it
    attempt     integer     NOT NULL,
    turn_id     text        NOT NULL,
    step        bigint      NOT NULL,
    result      bytea,                -- JSON, when done without an error
    failure     bytea,                -- soma.common.v1.Error, when done with one
    create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    end_time    timestamptz,
    PRIMARY KEY (tenant, key)
);
CREATE INDEX invocations_by_end ON toolgw.invocations (end_time) WHERE end_time IS NOT NULL;

CREATE TABLE toolgw.notes (
    tenant      text COLLATE "C" NOT NULL,
    key         text COLLATE "C" NOT NULL, -- of the call that wrote it: the same call cannot write twice
    session_id  bytea       NOT NULL,
    note        text        NOT NULL,
    create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant, key)
);
CREATE INDEX notes_by_session ON toolgw.notes (tenant, session_id, create_time);

ALTER TABLE toolgw.invocations ENABLE ROW LEVEL SECURITY;
ALTER TABLE toolgw.notes       ENABLE ROW LEVEL SECURITY;
CREATE POLICY tenant_rows ON toolgw.invocations USING (toolgw.may_touch(tenant));
CREATE POLICY tenant_rows ON toolgw.notes       USING (toolgw.may_touch(tenant));

GRANT USAGE ON SCHEMA toolgw TO soma_toolgw;
GRANT SELECT, INSERT, UPDATE, DELETE ON toolgw.runners     TO soma_toolgw;
GRANT SELECT, INSERT, UPDATE, DELETE ON toolgw.invocations TO soma_toolgw;
GRANT SELECT, INSERT                 ON toolgw.notes       TO soma_toolgw;
