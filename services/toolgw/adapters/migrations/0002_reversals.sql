-- Calls that a stopped turn no longer waits for, and the undoing of a stopped turn's calls.
--
-- Processes of the release before go on: the columns have defaults, or are null where that release writes none. A call of
-- theirs cannot be undone, as its arguments are not kept.

ALTER TABLE toolgw.invocations
    ADD COLUMN cancel_time  timestamptz,                  -- first asked to end, while it ran
    ADD COLUMN never_ran    boolean NOT NULL DEFAULT false, -- failed before the tool did anything
    ADD COLUMN compensation text,                         -- the tool that undoes it; null: nothing does
    ADD COLUMN arguments    bytea,                        -- JSON, kept where there is a compensation
    ADD COLUMN late_result  bytea,                        -- JSON; came when the outcome was unknown already, never applied
    ADD COLUMN late_failure bytea,                        -- soma.common.v1.Error, likewise
    ADD COLUMN late_time    timestamptz;

-- One row per turn whose calls were to be undone: what the first look decided, then how it ended.
CREATE TABLE toolgw.reversals (
    tenant      text COLLATE "C" NOT NULL,
    session_id  bytea       NOT NULL,
    turn_id     text COLLATE "C" NOT NULL,
    state       text        NOT NULL CHECK (state IN ('undoing', 'reverted', 'kept')),
    effects     text[]      NOT NULL, -- keys of the calls that may have had an effect, the last call first
    kept        text[]      NOT NULL, -- those whose effect stays
    create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    end_time    timestamptz,
    PRIMARY KEY (tenant, session_id, turn_id)
);
CREATE INDEX reversals_by_age ON toolgw.reversals (create_time);

ALTER TABLE toolgw.reversals ENABLE ROW LEVEL SECURITY;
CREATE POLICY tenant_rows ON toolgw.reversals USING (toolgw.may_touch(tenant));

GRANT SELECT, INSERT, UPDATE, DELETE ON toolgw.reversals TO soma_toolgw;
GRANT DELETE                         ON toolgw.notes     TO soma_toolgw;
