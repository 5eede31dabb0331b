-- The turn engine's truth. Written only by the owner of a partition, under that partition's row.
-- Ids are BLAKE2b-128 digests as bytea. Every tenant-owned table has row-level security over the list of tenants in `soma.tenants`.

CREATE TABLE router.layout (
    name  text PRIMARY KEY,
    value text NOT NULL
);
COMMENT ON TABLE router.layout IS 'Number of partitions and lanes and the hash; a process with other settings refuses to start.';

CREATE TABLE router.routers (
    router   text PRIMARY KEY,
    beat_at  timestamptz NOT NULL
);
COMMENT ON TABLE router.routers IS 'Routers that live, so that partitions are spread evenly.';

-- Heartbeats have a row of their own: on the partition row they would wait for commits.
CREATE TABLE router.leases (
    partition  integer PRIMARY KEY,
    owner      text,
    term       uuid,
    expires_at timestamptz NOT NULL DEFAULT '-infinity'
) WITH (fillfactor = 20);
COMMENT ON TABLE router.leases IS 'Who may hold a partition. Says when to take over, never what may be written: that is partitions.term.';

CREATE TABLE router.partitions (
    id            integer PRIMARY KEY,
    term          uuid,
    owner         text,
    epoch         bigint NOT NULL DEFAULT 0,
    head          bigint NOT NULL DEFAULT 0,
    mail_head     bigint NOT NULL DEFAULT 0,
    mail_floor    bigint NOT NULL DEFAULT 1,
    cursor_stream text   NOT NULL DEFAULT '',
    cursor_seq    bigint NOT NULL DEFAULT 0,
    cursor_batch  text   NOT NULL DEFAULT ''
) WITH (fillfactor = 20);
COMMENT ON TABLE router.partitions IS 'The fence. Every transaction of an owner first updates this row under (term, head, mail_head, cursor).';
COMMENT ON COLUMN router.partitions.term IS 'A random UUID per acquisition.';
COMMENT ON COLUMN router.partitions.epoch IS 'Counts acquisitions, for people.';
COMMENT ON COLUMN router.partitions.head IS 'Dense position of the last outcome.';
COMMENT ON COLUMN router.partitions.mail_head IS 'Position of the last message.';
COMMENT ON COLUMN router.partitions.mail_floor IS 'Every message below has ended: a new owner need not look there.';
COMMENT ON COLUMN router.partitions.cursor_seq IS 'Last lane message that is in the mailbox; with stream incarnation and batch id, so that a lane that went back is seen.';

CREATE TABLE router.sessions (
    session_id     bytea PRIMARY KEY,
    partition      integer NOT NULL,
    tenant         text NOT NULL,
    agent          text NOT NULL,
    channel        text NOT NULL,
    session        text NOT NULL,
    create_time    timestamptz NOT NULL DEFAULT now(),
    update_time    timestamptz NOT NULL DEFAULT now(),
    message_count  bigint NOT NULL DEFAULT 0,
    last_position  bigint NOT NULL DEFAULT 0,
    done_position  bigint NOT NULL DEFAULT 0,
    control_position bigint NOT NULL DEFAULT 0,
    turn_count     bigint NOT NULL DEFAULT 0,
    delivery_count bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 70);
COMMENT ON COLUMN router.sessions.done_position IS 'Every message of the session up to here has its outcome.';
COMMENT ON COLUMN router.sessions.control_position IS 'Every cancel of the session up to here has been applied.';
COMMENT ON COLUMN router.sessions.turn_count IS 'Turns that have ended; the running one, if any, has the next number.';
CREATE INDEX sessions_by_tenant ON router.sessions (tenant, agent, channel, session);

CREATE TABLE router.messages (
    partition    integer NOT NULL,
    position     bigint  NOT NULL,
    session_id   bytea   NOT NULL,
    message_id   bytea   NOT NULL,
    content_hash bytea   NOT NULL,
    tenant       text    NOT NULL,
    kind         smallint NOT NULL,
    policy       smallint NOT NULL,
    deliver      boolean NOT NULL,
    fault        smallint NOT NULL,
    accept_ms    bigint  NOT NULL,
    target_turn  bytea,
    traceparent  text    NOT NULL,
    content      bytea   NOT NULL,
    PRIMARY KEY (partition, position)
);
COMMENT ON TABLE router.messages IS 'The mailbox and the history: a row is inserted once and never changed. Content is bytes, so that no content can be refused here.';
COMMENT ON COLUMN router.messages.fault IS 'ErrorReason with which the message ends unanswered by a brain; 0: none.';
CREATE UNIQUE INDEX messages_idempotency ON router.messages (message_id, content_hash);
CREATE INDEX messages_by_session ON router.messages (session_id, position);

CREATE TABLE router.turns (
    turn_id        bytea PRIMARY KEY,
    session_id     bytea NOT NULL,
    partition      integer NOT NULL,
    tenant         text NOT NULL,
    number         bigint NOT NULL,
    first_position bigint NOT NULL,
    last_position  bigint NOT NULL,
    status         smallint NOT NULL DEFAULT 1,
    outcome        smallint NOT NULL DEFAULT 0,
    dispatch       integer NOT NULL DEFAULT 1,
    strikes        integer NOT NULL DEFAULT 0,
    step_count     integer NOT NULL DEFAULT 0,
    agent_revision text NOT NULL,
    create_time    timestamptz NOT NULL DEFAULT now(),
    end_time       timestamptz
) WITH (fillfactor = 70);
COMMENT ON COLUMN router.turns.status IS '1 running, 2 converging, 3 ended: soma.router.v1.TurnStatus.';
COMMENT ON COLUMN router.turns.strikes IS 'How often a brain or router died with the turn in hand.';
CREATE UNIQUE INDEX turns_by_session ON router.turns (session_id, number);
CREATE INDEX turns_by_tenant ON router.turns (tenant, create_time, turn_id);

CREATE TABLE router.steps (
    turn_id     bytea NOT NULL,
    step        integer NOT NULL,
    tenant      text NOT NULL,
    kind        smallint NOT NULL,
    dispatch    integer NOT NULL,
    create_time timestamptz NOT NULL DEFAULT now(),
    body        bytea NOT NULL,
    PRIMARY KEY (turn_id, step)
);
COMMENT ON TABLE router.steps IS 'The journal: a step is inserted once, numbers are contiguous.';

CREATE TABLE router.agent_revisions (
    tenant   text NOT NULL,
    agent    text NOT NULL,
    revision text NOT NULL,
    spec     bytea NOT NULL,
    PRIMARY KEY (tenant, agent, revision)
);
COMMENT ON TABLE router.agent_revisions IS 'The agents that turns were started with, so that a turn can go on when the control plane cannot be asked.';

-- A queue: a row per outcome that the channel has not acknowledged. What is not here is delivered.
CREATE TABLE router.deliveries (
    partition  integer NOT NULL,
    position   bigint NOT NULL,
    session_id bytea NOT NULL,
    tenant     text NOT NULL,
    channel    text NOT NULL,
    payload    bytea NOT NULL,
    PRIMARY KEY (partition, position)
);
CREATE INDEX deliveries_by_channel ON router.deliveries (partition, tenant, channel, position);
CREATE INDEX deliveries_by_session ON router.deliveries (session_id);

CREATE TABLE router.dead_letters (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    create_time timestamptz NOT NULL DEFAULT now(),
    tenant      text NOT NULL,
    kind        text NOT NULL,
    partition   integer NOT NULL,
    ref         bytea NOT NULL,
    reason      smallint NOT NULL,
    message     text NOT NULL,
    payload     bytea NOT NULL
);
COMMENT ON TABLE router.dead_letters IS 'What was set aside: items that cannot be read, deliveries tried too often, poisoned turns.';
CREATE INDEX dead_letters_by_tenant ON router.dead_letters (tenant, id);

-- The policy is written so that no index fits it: with `tenant = ANY (...)` the planner walks all rows of the tenant instead of the
-- few that a query names by key. The list is read once per statement.
DO $$
DECLARE t text;
BEGIN
    FOREACH t IN ARRAY ARRAY['sessions', 'messages', 'turns', 'steps', 'agent_revisions', 'deliveries', 'dead_letters'] LOOP
        EXECUTE format('ALTER TABLE router.%I ENABLE ROW LEVEL SECURITY', t);
        EXECUTE format(
            'CREATE POLICY by_tenant ON router.%I TO soma_router '
            'USING ((SELECT string_to_array(current_setting(''soma.tenants'', true), '','')) @> ARRAY[tenant]) '
            'WITH CHECK ((SELECT string_to_array(current_setting(''soma.tenants'', true), '','')) @> ARRAY[tenant])', t);
    END LOOP;
END
$$;

-- One group of one router: many sessions, many tenants, one transaction, one round trip.
--
-- SM001: a fence failed; DETAIL lists the partitions that this caller does not hold any more. Nothing was written.
-- SM002: a turn is not as the caller believes; DETAIL lists the partitions concerned. Nothing was written.
--
-- `inserted` holds the positions of messages that were new, `reused` those of them whose message id was there with another content.
-- `s_*` describe sessions of new messages.
CREATE FUNCTION router.commit_group(
    p_tenants text,
    f_id integer[], f_term uuid[], f_head_old bigint[], f_head bigint[], f_mail_old bigint[], f_mail bigint[], f_floor bigint[],
    f_seq_old bigint[], f_stream text[], f_seq bigint[], f_batch text[],
    m_partition integer[], m_position bigint[], m_session bytea[], m_id bytea[], m_hash bytea[], m_tenant text[], m_kind smallint[],
    m_policy smallint[], m_deliver boolean[], m_fault smallint[], m_accept bigint[], m_target bytea[], m_trace text[], m_content bytea[],
    m_agent text[], m_channel text[], m_name text[],
    t_turn bytea[], t_session bytea[], t_partition integer[], t_tenant text[], t_number bigint[], t_first bigint[], t_last bigint[],
    t_revision text[], t_fresh boolean[],
    r_tenant text[], r_agent text[], r_revision text[], r_spec bytea[],
    d_turn bytea[], d_dispatch integer[], d_strikes integer[],
    c_session bytea[], c_position bigint[], c_turn bytea[],
    s_turn bytea[], s_step integer[], s_tenant text[], s_kind smallint[], s_dispatch integer[], s_body bytea[],
    j_turn bytea[], j_step integer[], j_partition integer[],
    e_turn bytea[], e_session bytea[], e_partition integer[], e_outcome smallint[], e_base integer[], e_steps integer[], e_done bigint[],
    e_number bigint[], e_deliveries bigint[],
    v_partition integer[], v_position bigint[], v_session bytea[], v_tenant text[], v_channel text[], v_payload bytea[],
    a_partition integer[], a_position bigint[],
    x_tenant text[], x_kind text[], x_partition integer[], x_ref bytea[], x_reason smallint[], x_message text[], x_payload bytea[],
    OUT inserted bigint[], OUT inserted_partition integer[], OUT reused bigint[], OUT reused_partition integer[],
    OUT o_session bytea[], OUT o_turns bigint[], OUT o_deliveries bigint[], OUT o_done bigint[], OUT o_started bytea[]
) LANGUAGE plpgsql AS $$
DECLARE
    held integer[];
    clean bigint[];
    clean_partition integer[];
    found_count integer;
BEGIN
    PERFORM set_config('soma.tenants', p_tenants, true);

    -- The fence: compare-and-set, serialisation and dense numbering at once. The caller sends partitions in order of id.
    WITH moved AS (
        UPDATE router.partitions p
        SET head = f.head, mail_head = f.mail, mail_floor = f.floor, cursor_stream = f.stream, cursor_seq = f.seq, cursor_batch = f.batch
        FROM unnest(f_id, f_term, f_head_old, f_head, f_mail_old, f_mail, f_floor, f_seq_old, f_stream, f_seq, f_batch)
            AS f(id, term, head_old, head, mail_old, mail, floor, seq_old, stream, seq, batch)
        WHERE p.id = f.id AND p.term = f.term AND p.head = f.head_old AND p.mail_head = f.mail_old AND p.cursor_seq = f.seq_old
        RETURNING p.id
    )
    SELECT array_agg(id) INTO held FROM moved;
    IF coalesce(cardinality(held), 0) <> cardinality(f_id) THEN
        RAISE EXCEPTION 'fenced' USING ERRCODE = 'SM001',
            DETAIL = (SELECT string_agg(id::text, ',') FROM unnest(f_id) id WHERE id <> ALL (coalesce(held, '{}')));
    END IF;

    IF cardinality(m_position) > 0 THEN
        WITH item AS (
            SELECT * FROM unnest(m_partition, m_position, m_session, m_id, m_hash, m_tenant, m_kind, m_policy, m_deliver, m_fault,
                                 m_accept, m_target, m_trace, m_content)
                AS i(partition, position, session_id, message_id, content_hash, tenant, kind, policy, deliver, fault,
                     accept_ms, target_turn, traceparent, content)
        ), put AS (
            INSERT INTO router.messages AS m (partition, position, session_id, message_id, content_hash, tenant, kind, policy, deliver,
                                              fault, accept_ms, target_turn, traceparent, content)
            SELECT i.partition, i.position, i.session_id, i.message_id, i.content_hash, i.tenant, i.kind, i.policy, i.deliver,
                   -- 12: IDEMPOTENCY_KEY_REUSED
                   CASE WHEN i.fault = 0 AND EXISTS (SELECT FROM router.messages o
                                                     WHERE o.message_id = i.message_id AND o.content_hash <> i.content_hash)
                        THEN 12 ELSE i.fault END,
                   i.accept_ms, i.target_turn, i.traceparent, i.content
            FROM item i
            ON CONFLICT (message_id, content_hash) DO NOTHING
            RETURNING m.partition, m.position, m.session_id, m.fault
        )
        SELECT array_agg(position), array_agg(partition),
               array_agg(position) FILTER (WHERE fault = 12), array_agg(partition) FILTER (WHERE fault = 12),
               array_agg(position) FILTER (WHERE fault = 0), array_agg(partition) FILTER (WHERE fault = 0)
        INTO inserted, inserted_partition, reused, reused_partition, clean, clean_partition FROM put;

        IF inserted IS NOT NULL THEN
            WITH touched AS (
                SELECT i.session_id, min(i.partition) AS partition, min(i.tenant) AS tenant, min(i.agent) AS agent,
                       min(i.channel) AS channel, min(i.session) AS session, max(i.position) AS last,
                       count(*) FILTER (WHERE i.kind <> 2) AS messages
                FROM unnest(m_partition, m_position, m_session, m_tenant, m_agent, m_channel, m_name, m_kind)
                    AS i(partition, position, session_id, tenant, agent, channel, session, kind)
                -- IS TRUE: as a join it would be a nested loop over the group, squared (the writer has hash joins off).
                WHERE ((i.partition, i.position) IN (SELECT * FROM unnest(inserted_partition, inserted))) IS TRUE
                GROUP BY i.session_id
            ), put AS (
                INSERT INTO router.sessions AS s (session_id, partition, tenant, agent, channel, session, message_count, last_position)
                SELECT session_id, partition, tenant, agent, channel, session, messages, last FROM touched
                ON CONFLICT (session_id) DO UPDATE
                SET message_count = s.message_count + excluded.message_count, last_position = excluded.last_position, update_time = now()
                RETURNING s.session_id, s.turn_count, s.delivery_count, s.done_position
            )
            SELECT array_agg(session_id), array_agg(turn_count), array_agg(delivery_count), array_agg(done_position)
            INTO o_session, o_turns, o_deliveries, o_done FROM put;
        END IF;
    END IF;

    IF cardinality(r_revision) > 0 THEN
        INSERT INTO router.agent_revisions (tenant, agent, revision, spec)
        SELECT * FROM unnest(r_tenant, r_agent, r_revision, r_spec)
        ON CONFLICT DO NOTHING;
    END IF;

    -- A turn may be started together with the message it answers (fresh): then only if that message was new and without fault.
    IF cardinality(t_turn) > 0 THEN
        WITH put AS (
            INSERT INTO router.turns (turn_id, session_id, partition, tenant, number, first_position, last_position, agent_revision)
            SELECT t.turn_id, t.session_id, t.partition, t.tenant, t.number, t.first, t.last, t.revision
            FROM unnest(t_turn, t_session, t_partition, t_tenant, t_number, t_first, t_last, t_revision, t_fresh)
                AS t(turn_id, session_id, partition, tenant, number, first, last, revision, fresh)
            WHERE NOT t.fresh OR (t.partition, t.first) IN (SELECT * FROM unnest(clean_partition, clean))
            RETURNING turn_id
        )
        SELECT array_agg(turn_id) INTO o_started FROM put;
    END IF;

    IF cardinality(d_turn) > 0 THEN
        UPDATE router.turns t SET dispatch = d.dispatch, strikes = d.strikes
        FROM unnest(d_turn, d_dispatch, d_strikes) AS d(turn_id, dispatch, strikes)
        WHERE t.turn_id = d.turn_id AND t.status <> 3;
    END IF;

    IF cardinality(c_session) > 0 THEN
        UPDATE router.sessions s SET control_position = greatest(s.control_position, c.position)
        FROM (SELECT session_id, max(position) AS position FROM unnest(c_session, c_position) AS i(session_id, position)
              GROUP BY session_id) c
        WHERE s.session_id = c.session_id;
        UPDATE router.turns t SET status = 2
        FROM unnest(c_turn) AS c(turn_id)
        WHERE t.turn_id = c.turn_id AND t.status = 1;
    END IF;

    IF cardinality(s_turn) > 0 THEN
        INSERT INTO router.steps (turn_id, step, tenant, kind, dispatch, body)
        SELECT * FROM unnest(s_turn, s_step, s_tenant, s_kind, s_dispatch, s_body);
    END IF;

    -- A step follows the one before it, in a turn that is open.
    IF cardinality(j_turn) > 0 THEN
        UPDATE router.turns t SET step_count = j.step
        FROM unnest(j_turn, j_step) AS j(turn_id, step)
        WHERE t.turn_id = j.turn_id AND t.status <> 3 AND t.step_count = j.step - 1;
        GET DIAGNOSTICS found_count = ROW_COUNT;
        IF found_count <> cardinality(j_turn) THEN
            RAISE EXCEPTION 'a step does not follow the journal of an open turn' USING ERRCODE = 'SM002', DETAIL = (
                SELECT string_agg(DISTINCT j.partition::text, ',')
                FROM unnest(j_turn, j_step, j_partition) AS j(turn_id, step, partition)
                WHERE NOT EXISTS (SELECT FROM router.turns t
                                  WHERE t.turn_id = j.turn_id AND t.status <> 3 AND t.step_count = j.step));
        END IF;
    END IF;

    IF cardinality(e_turn) > 0 THEN
        UPDATE router.turns t SET status = 3, outcome = e.outcome, step_count = e.steps, end_time = now()
        FROM unnest(e_turn, e_outcome, e_base, e_steps) AS e(turn_id, outcome, base, steps)
        WHERE t.turn_id = e.turn_id AND t.status <> 3 AND t.step_count = e.base;
        GET DIAGNOSTICS found_count = ROW_COUNT;
        IF found_count <> cardinality(e_turn) THEN
            RAISE EXCEPTION 'a turn that is to end is not running, or its journal is another' USING ERRCODE = 'SM002', DETAIL = (
                SELECT string_agg(DISTINCT e.partition::text, ',') FROM unnest(e_turn, e_partition) AS e(turn_id, partition)
                WHERE NOT EXISTS (SELECT FROM router.turns t
                                  WHERE t.turn_id = e.turn_id AND t.status = 3 AND t.end_time = now()));
        END IF;
        UPDATE router.sessions s
        SET done_position = e.done, turn_count = e.number, delivery_count = e.deliveries, update_time = now()
        FROM unnest(e_session, e_partition, e_done, e_number, e_deliveries) AS e(session_id, partition, done, number, deliveries)
        WHERE s.session_id = e.session_id AND s.partition = e.partition;
        GET DIAGNOSTICS found_count = ROW_COUNT;
        IF found_count <> cardinality(e_turn) THEN
            RAISE EXCEPTION 'a session is in another partition' USING ERRCODE = 'SM002',
                DETAIL = (SELECT string_agg(DISTINCT partition::text, ',') FROM unnest(e_partition) partition);
        END IF;
    END IF;

    IF cardinality(v_position) > 0 THEN
        INSERT INTO router.deliveries (partition, position, session_id, tenant, channel, payload)
        SELECT * FROM unnest(v_partition, v_position, v_session, v_tenant, v_channel, v_payload);
    END IF;

    IF cardinality(a_position) > 0 THEN
        DELETE FROM router.deliveries d USING unnest(a_partition, a_position) AS a(partition, position)
        WHERE d.partition = a.partition AND d.position = a.position;
    END IF;

    IF cardinality(x_kind) > 0 THEN
        INSERT INTO router.dead_letters (tenant, kind, partition, ref, reason, message, payload)
        SELECT * FROM unnest(x_tenant, x_kind, x_partition, x_ref, x_reason, x_message, x_payload);
    END IF;
END
$$;

-- What a new owner must know: called after its term is in the partition row, so that nothing can be written behind its back.
-- Runs as the schema's owner, because an owner of a partition reads the pending messages of all tenants in it; it returns keys and
-- positions, never content. Raises the dispatch of every running turn: items of the former owner's dispatches are ignored from now on.
CREATE FUNCTION router.load_partition(p_partition integer, p_term uuid, p_strike integer)
RETURNS TABLE (
    "position" bigint, message_id bytea, kind smallint, policy smallint, deliver boolean, fault smallint, accept_ms bigint,
    target_turn bytea, traceparent text,
    session_id bytea, tenant text, agent text, channel text, session text,
    done_position bigint, control_position bigint, turn_count bigint, delivery_count bigint,
    turn_id bytea, status smallint, dispatch integer, strikes integer, first_position bigint, last_position bigint, agent_revision text
) LANGUAGE plpgsql SECURITY DEFINER SET search_path = router, pg_temp AS $$
DECLARE
    from_position bigint;
BEGIN
    SELECT p.mail_floor INTO from_position FROM router.partitions p WHERE p.id = p_partition AND p.term = p_term;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'fenced' USING ERRCODE = 'SM001', DETAIL = p_partition::text;
    END IF;
    UPDATE router.turns t SET dispatch = t.dispatch + 1, strikes = t.strikes + p_strike
    FROM (SELECT DISTINCT s.session_id, s.turn_count + 1 AS number
          FROM router.messages m JOIN router.sessions s ON s.session_id = m.session_id
          WHERE m.partition = p_partition AND m.position >= from_position AND m.position > s.done_position) open
    WHERE t.session_id = open.session_id AND t.number = open.number AND t.status <> 3;
    RETURN QUERY
    SELECT m.position, m.message_id, m.kind, m.policy, m.deliver, m.fault, m.accept_ms, m.target_turn, m.traceparent,
           s.session_id, s.tenant, s.agent, s.channel, s.session,
           s.done_position, s.control_position, s.turn_count, s.delivery_count,
           t.turn_id, t.status, t.dispatch, t.strikes, t.first_position, t.last_position, t.agent_revision
    FROM router.messages m
    JOIN router.sessions s ON s.session_id = m.session_id
    LEFT JOIN router.turns t ON t.session_id = s.session_id AND t.number = s.turn_count + 1 AND t.status <> 3
    WHERE m.partition = p_partition AND m.position >= from_position
      AND (m.position > s.done_position AND m.kind <> 2 OR m.kind = 2 AND m.position > s.control_position)
    ORDER BY m.position;
END
$$;

-- Which channels of which tenants have outcomes waiting in a partition; keys only.
CREATE FUNCTION router.undelivered_channels(p_partition integer) RETURNS TABLE (tenant text, channel text)
LANGUAGE sql SECURITY DEFINER SET search_path = router, pg_temp AS $$
    SELECT DISTINCT d.tenant, d.channel FROM router.deliveries d WHERE d.partition = p_partition
$$;

-- Takes a partition that nobody holds: free, this router's own, or one whose lease ran out and still has the term that was seen.
CREATE FUNCTION router.acquire_partition(p_partition integer, p_router text, p_term uuid, p_seen uuid, p_ttl interval)
RETURNS TABLE (epoch bigint, head bigint, mail_head bigint, mail_floor bigint, cursor_stream text, cursor_seq bigint,
               cursor_batch text, former text)
LANGUAGE plpgsql AS $$
DECLARE
    former_owner text;
BEGIN
    SELECT l.owner INTO former_owner FROM router.leases l WHERE l.partition = p_partition FOR UPDATE;
    UPDATE router.leases l SET owner = p_router, term = p_term, expires_at = clock_timestamp() + p_ttl
    WHERE l.partition = p_partition
      AND (l.owner IS NULL OR l.owner = p_router
           OR l.expires_at < clock_timestamp() AND l.term IS NOT DISTINCT FROM p_seen);
    IF NOT FOUND THEN
        RETURN;
    END IF;
    RETURN QUERY
    UPDATE router.partitions p SET term = p_term, owner = p_router, epoch = p.epoch + 1
    WHERE p.id = p_partition
    RETURNING p.epoch, p.head, p.mail_head, p.mail_floor, p.cursor_stream, p.cursor_seq, p.cursor_batch, former_owner;
END
$$;

GRANT USAGE ON SCHEMA router TO soma_router;
GRANT SELECT, INSERT ON router.layout TO soma_router;
GRANT SELECT, INSERT, UPDATE, DELETE ON router.routers, router.leases TO soma_router;
GRANT SELECT, INSERT, UPDATE ON router.partitions, router.sessions, router.turns TO soma_router;
GRANT SELECT, INSERT ON router.messages, router.steps, router.agent_revisions, router.dead_letters TO soma_router;
GRANT SELECT, INSERT, DELETE ON router.deliveries TO soma_router;
REVOKE ALL ON FUNCTION router.load_partition, router.undelivered_channels, router.acquire_partition, router.commit_group FROM PUBLIC;
GRANT EXECUTE ON FUNCTION router.load_partition, router.undelivered_channels, router.acquire_partition, router.commit_group TO soma_router;
