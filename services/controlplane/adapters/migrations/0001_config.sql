-- Tenants, agents, their revisions, the change log that watchers follow, the audit log and the answers kept for retries.

CREATE SCHEMA IF NOT EXISTS controlplane;

-- Row-level security: the caller states in `soma.tenants` which tenants its transaction is about, as a comma list or `*`.
-- Not set, it is about none.
CREATE FUNCTION controlplane.may_touch(tenant text) RETURNS boolean
    LANGUAGE sql STABLE
    RETURN current_setting('soma.tenants', true) = '*'
        OR tenant = ANY (string_to_array(current_setting('soma.tenants', true), ','));

-- The one row that every change locks first: changes happen one after the other, and their versions have no gaps.
CREATE TABLE controlplane.config_head (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    version  bigint  NOT NULL
);
INSERT INTO controlplane.config_head (version) VALUES (0);

CREATE TABLE controlplane.tenants (
    tenant            text COLLATE "C" PRIMARY KEY,
    display_name      text        NOT NULL,
    weight            integer     NOT NULL,
    max_running_turns integer     NOT NULL,
    suspended         boolean     NOT NULL,
    version           bigint      NOT NULL, -- of the change that last wrote it; its etag is made from this
    create_time       timestamptz NOT NULL,
    update_time       timestamptz NOT NULL
);

CREATE TABLE controlplane.agents (
    tenant       text COLLATE "C" NOT NULL,
    agent        text COLLATE "C" NOT NULL,
    display_name text        NOT NULL,
    revision     text        NOT NULL,
    version      bigint      NOT NULL,
    create_time  timestamptz NOT NULL,
    update_time  timestamptz NOT NULL,
    PRIMARY KEY (tenant, agent)
);

-- Every content an agent ever had. Immutable, named by its content, and never removed: a turn keeps the revision it began
-- with, also when the agent changes or goes.
CREATE TABLE controlplane.agent_revisions (
    tenant      text COLLATE "C" NOT NULL,
    agent       text COLLATE "C" NOT NULL,
    revision    text        NOT NULL,
    spec        bytea       NOT NULL, -- soma.controlplane.v1.AgentSpec
    create_time timestamptz NOT NULL,
    PRIMARY KEY (tenant, agent, revision)
);

-- What each version changed, for watchers that are connected; a new watcher reads the tables above instead.
CREATE TABLE controlplane.config_changes (
    version     bigint      NOT NULL,
    ordinal     integer     NOT NULL, -- of the resource among those the version changed
    tenant      text COLLATE "C" NOT NULL,
    kind        text        NOT NULL CHECK (kind IN ('tenant', 'agent')),
    name        text        NOT NULL, -- resource name
    body        bytea,                -- soma.controlplane.v1.Tenant or Agent; null: it is gone
    change_time timestamptz NOT NULL,
    PRIMARY KEY (version, ordinal)
);
CREATE INDEX config_changes_by_time ON controlplane.config_changes (change_time);

-- Who changed what. Only ever added to: the service has no right to change or remove a row.
CREATE TABLE controlplane.audit_log (
    version     bigint      NOT NULL,
    ordinal     integer     NOT NULL,
    change_time timestamptz NOT NULL,
    tenant      text COLLATE "C" NOT NULL,
    actor       text        NOT NULL, -- subject of the caller's token
    method      text        NOT NULL,
    request_id  text        NOT NULL,
    resource    text        NOT NULL,
    before      jsonb,                -- null: it did not exist
    after       jsonb,                -- null: it is gone
    PRIMARY KEY (version, ordinal)
);
CREATE INDEX audit_log_by_tenant ON controlplane.audit_log (tenant, version);

-- Answers kept for retries with the same request id.
CREATE TABLE controlplane.answered_requests (
    tenant      text COLLATE "C" NOT NULL, -- the request's scope: a tenant, or `*` for requests about tenants themselves
    request_id  text        NOT NULL,
    fingerprint bytea       NOT NULL,
    response    bytea       NOT NULL,
    answer_time timestamptz NOT NULL,
    PRIMARY KEY (tenant, request_id)
);
CREATE INDEX answered_requests_by_time ON controlplane.answered_requests (answer_time);

ALTER TABLE controlplane.tenants           ENABLE ROW LEVEL SECURITY;
ALTER TABLE controlplane.agents            ENABLE ROW LEVEL SECURITY;
ALTER TABLE controlplane.agent_revisions   ENABLE ROW LEVEL SECURITY;
ALTER TABLE controlplane.config_changes    ENABLE ROW LEVEL SECURITY;
ALTER TABLE controlplane.audit_log         ENABLE ROW LEVEL SECURITY;
ALTER TABLE controlplane.answered_requests ENABLE ROW LEVEL SECURITY;

CREATE POLICY tenant_rows ON controlplane.tenants           USING (controlplane.may_touch(tenant));
CREATE POLICY tenant_rows ON controlplane.agents            USING (controlplane.may_touch(tenant));
CREATE POLICY tenant_rows ON controlplane.agent_revisions   USING (controlplane.may_touch(tenant));
CREATE POLICY tenant_rows ON controlplane.config_changes    USING (controlplane.may_touch(tenant));
CREATE POLICY tenant_rows ON controlplane.audit_log         USING (controlplane.may_touch(tenant));
CREATE POLICY tenant_rows ON controlplane.answered_requests USING (controlplane.may_touch(tenant));

GRANT USAGE ON SCHEMA controlplane TO soma_controlplane;
GRANT SELECT, UPDATE                 ON controlplane.config_head       TO soma_controlplane;
GRANT SELECT, INSERT, UPDATE, DELETE ON controlplane.tenants           TO soma_controlplane;
GRANT SELECT, INSERT, UPDATE, DELETE ON controlplane.agents            TO soma_controlplane;
GRANT SELECT, INSERT                 ON controlplane.agent_revisions   TO soma_controlplane;
GRANT SELECT, INSERT, DELETE         ON controlplane.config_changes    TO soma_controlplane;
GRANT SELECT, INSERT                 ON controlplane.audit_log         TO soma_controlplane;
GRANT SELECT, INSERT, DELETE         ON controlplane.answered_requests TO soma_controlplane;
