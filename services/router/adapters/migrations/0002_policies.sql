-- What a message does that arrives while a turn runs, and control of sessions and turns.

ALTER TABLE router.messages
    ADD COLUMN debounce_ms     integer NOT NULL DEFAULT 0,
    ADD COLUMN debounce_max_ms integer NOT NULL DEFAULT 0,
    ADD COLUMN ingest_time     timestamptz NOT NULL DEFAULT now();
COMMENT ON COLUMN router.messages.policy IS 'soma.common.v1.ArrivalPolicy: the message''s own, or its agent''s when it was stored.';
COMMENT ON COLUMN router.messages.debounce_ms IS 'Under accumulate: how long after this message, and at most how long after the first of its group, companions are waited for.';
COMMENT ON COLUMN router.messages.ingest_time IS 'By the clock of the database: what a group waits for is reckoned from here, by every owner alike.';

ALTER TABLE router.turns
    ADD COLUMN stop      smallint NOT NULL DEFAULT 0,
    ADD COLUMN stop_time timestamptz,
    ADD COLUMN on_trial  boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN router.turns.stop IS 'While converging: the soma.common.v1.Outcome it is to end with; 0 in rows of an older release: cancelled.';
COMMENT ON COLUMN router.turns.on_trial IS 'A suspect that runs, alone among suspects: the others only wait, and whatever dies is not their doing.';
COMMENT ON COLUMN router.turns.number IS 'From 1; below 0 for a rejected message, which is no turn of the session: its position, negated.';

ALTER TABLE router.sessions ADD COLUMN paused boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN router.sessions.paused IS 'No turn starts.';

-- One group of one router: many sessions, many tenants, one transaction, one round trip.
--
-- SM001: a fence failed; DETAIL lists the partitions that this caller does not hold any more. Nothing was written.
-- SM002: a turn is not as the caller believes; DETAIL lists the partitions concerned. Nothing was written.
--
-- `inserted` holds the positions of messages that were new, `reused` those of them whose message id was there with another content.
-- `s_*` describe sessions of new messages.
--
-- The function of the release before stays beside it under its own number of parameters, so that routers of both releases can write.
CREATE FUNCTION router.commit_group(
    p_tenants text,
    f_id integer[], f_term uuid[], f_head_old bigint[], f_head bigint[], f_mail_old bigint[], f_mail bigint[], f_floor bigint[],
    f_seq_old bigint[], f_stream text[], f_seq bigint[], f_batch text[],
    m_partition integer[], m_position bigint[], m_session bytea[], m_id bytea[], m_hash bytea[], m_tenant text[], m_kind smallint[],
    m_policy smallint[], m_deliver boolean[], m_fault smallint[], m_accept bigint[], m_target bytea[], m_trace text[], m_content bytea[],
    m_agent text[], m_channel text[], m_name text[], m_debounce integer[], m_debounce_max integer[],
    t_turn bytea[], t_session bytea[], t_partition integer[], t_tenant text[], t_number bigint[], t_first bigint[], t_last bigint[],
    t_revision text[], t_fresh boolean[],
    r_tenant text[], r_agent text[], r_revision text[], r_spec bytea[],
    d_turn bytea[], d_dispatch integer[], d_strikes integer[], d_trial boolean[],
    c_session bytea[], c_position bigint[], c_turn bytea[], c_stop smallint[], c_paused boolean[],
    i_turn bytea[], i_last bigint[],
    q_turn bytea[], q_session bytea[], q_partition integer[], q_tenant text[], q_position bigint[], q_deliveries bigint[], q_body bytea[],
    s_turn bytea[], s_step integer[], s_tenant text[], s_kind smallint[], s_dispatch integer[], s_body bytea[],
    j_turn bytea[], j_step integer[], j_partition integer[],
    e_turn bytea[], e_session bytea[], e_partition integer[], e_outcome smallint[], e_base integer[], e_steps integer[], e_done bigint[],
    e_number bigint[], e_deliveries bigint[],
    v_partition integer[], v_position bigint[], v_session bytea[], v_tenant text[], v_channel text[], v_payload bytea[],
    a_partition integer[], a_position bigint[],
    x_tenant text[], x_kind text[], x_partition integer[], x_ref bytea[], x_reason smallint[], x_message text[], x_payload bytea[],
    OUT inserted bigint[], OUT inserted_partition integer[], OUT reused bigint[], OUT reused_partition integer[],
    OUT o_session bytea[], OUT o_turns bigint[], OUT o_deliveries bigint[], OUT o_done bigint[], OUT o_paused boolean[],
    OUT o_started bytea[]
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
                                 m_accept, m_target, m_trace, m_content, m_debounce, m_debounce_max)
                AS i(partition, position, session_id, message_id, content_hash, tenant, kind, policy, deliver, fault,
                     accept_ms, target_turn, traceparent, content, debounce_ms, debounce_max_ms)
        ), put AS (
            INSERT INTO router.messages AS m (partition, position, session_id, message_id, content_hash, tenant, kind, policy, deliver,
                                              fault, accept_ms, target_turn, traceparent, content, debounce_ms, debounce_max_ms)
            SELECT i.partition, i.position, i.session_id, i.message_id, i.content_hash, i.tenant, i.kind, i.policy, i.deliver,
                   -- 12: IDEMPOTENCY_KEY_REUSED
                   CASE WHEN i.fault = 0 AND EXISTS (SELECT FROM router.messages o
                                                     WHERE o.message_id = i.message_id AND o.content_hash <> i.content_hash)
                        THEN 12 ELSE i.fault END,
                   i.accept_ms, i.target_turn, i.traceparent, i.content, i.debounce_ms, i.debounce_max_ms
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
                       count(*) FILTER (WHERE i.kind < 2) AS messages
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
                RETURNING s.session_id, s.turn_count, s.delivery_count, s.done_position, s.paused
            )
            SELECT array_agg(session_id), array_agg(turn_count), array_agg(delivery_count), array_agg(done_position), array_agg(paused)
            INTO o_session, o_turns, o_deliveries, o_done, o_paused FROM put;
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
        UPDATE router.turns t SET dispatch = d.dispatch, strikes = d.strikes, on_trial = d.trial
        FROM unnest(d_turn, d_dispatch, d_strikes, d_trial) AS d(turn_id, dispatch, strikes, trial)
        WHERE t.turn_id = d.turn_id AND t.status <> 3;
    END IF;

    -- Controls reach a session in order; the last pause or resume of the group counts. The first stop of a turn counts, except that a
    -- cancel also stops what was to be rolled back.
    IF cardinality(c_session) > 0 THEN
        UPDATE router.sessions s
        SET control_position = greatest(s.control_position, c.position), paused = coalesce(c.paused[cardinality(c.paused)], s.paused)
        FROM (SELECT session_id, max(position) AS position, array_agg(paused ORDER BY place) FILTER (WHERE paused IS NOT NULL) AS paused
              FROM unnest(c_session, c_position, c_paused) WITH ORDINALITY AS i(session_id, position, paused, place)
              GROUP BY session_id) c
        WHERE s.session_id = c.session_id;
        UPDATE router.turns t
        SET status = 2, stop_time = coalesce(t.stop_time, now()),
            stop = CASE WHEN CASE t.status WHEN 1 THEN c.stop[1] ELSE t.stop END = 6 AND c.stop @> '{4}' THEN 4 ELSE c.stop[1] END
        FROM (SELECT turn_id, array_agg(stop ORDER BY place) AS stop
              FROM unnest(c_turn, c_stop) WITH ORDINALITY AS i(turn_id, stop, place)
              WHERE turn_id IS NOT NULL GROUP BY turn_id) c
        WHERE t.turn_id = c.turn_id AND (t.status = 1 OR t.status = 2 AND t.stop = 6 AND c.stop @> '{4}');
    END IF;

    -- Further inputs of running turns.
    IF cardinality(i_turn) > 0 THEN
        UPDATE router.turns t SET last_position = i.last
        FROM (SELECT turn_id, max(last) AS last FROM unnest(i_turn, i_last) AS i(turn_id, last) GROUP BY turn_id) i
        WHERE t.turn_id = i.turn_id AND t.last_position < i.last;
    END IF;

    -- Messages that end before those that were there first. Their turns ran for nobody and have no number in the session: the position,
    -- negated, holds the place.
    IF cardinality(q_turn) > 0 THEN
        INSERT INTO router.turns (turn_id, session_id, partition, tenant, number, first_position, last_position, status, outcome,
                                  step_count, agent_revision, end_time)
        SELECT q.turn_id, q.session_id, q.partition, q.tenant, -q.position, q.position, q.position, 3, 3, 1, '', now()
        FROM unnest(q_turn, q_session, q_partition, q_tenant, q_position) AS q(turn_id, session_id, partition, tenant, position);
        INSERT INTO router.steps (turn_id, step, tenant, kind, dispatch, body)
        SELECT q.turn_id, 1, q.tenant, 4, 1, q.body FROM unnest(q_turn, q_tenant, q_body) AS q(turn_id, tenant, body);
        UPDATE router.sessions s SET delivery_count = greatest(s.delivery_count, q.deliveries)
        FROM (SELECT session_id, max(deliveries) AS deliveries FROM unnest(q_session, q_deliveries) AS i(session_id, deliveries)
              GROUP BY session_id) q
        WHERE s.session_id = q.session_id;
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
        SET done_position = e.done, turn_count = e.number, delivery_count = greatest(s.delivery_count, e.deliveries), update_time = now()
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

-- What a new owner must know, as before, and: policies, how long ago messages came by the clock of the database, stops, pauses, and which
-- messages were in a turn that was rolled back.
DROP FUNCTION router.load_partition(integer, uuid, integer);
CREATE FUNCTION router.load_partition(p_partition integer, p_term uuid, p_strike integer)
RETURNS TABLE (
    "position" bigint, message_id bytea, kind smallint, policy smallint, deliver boolean, fault smallint, accept_ms bigint,
    target_turn bytea, traceparent text, debounce_ms integer, debounce_max_ms integer, age_ms bigint,
    session_id bytea, tenant text, agent text, channel text, session text,
    done_position bigint, control_position bigint, turn_count bigint, delivery_count bigint, paused boolean,
    turn_id bytea, status smallint, dispatch integer, strikes integer, first_position bigint, last_position bigint, agent_revision text,
    stop smallint, stop_age_ms bigint, rolled_back boolean, came_later boolean, size integer
) LANGUAGE plpgsql SECURITY DEFINER SET search_path = router, pg_temp AS $$
DECLARE
    from_position bigint;
BEGIN
    SELECT p.mail_floor INTO from_position FROM router.partitions p WHERE p.id = p_partition AND p.term = p_term;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'fenced' USING ERRCODE = 'SM001', DETAIL = p_partition::text;
    END IF;
    -- From the second strike on a turn is a suspect (dispatch_turns.py: SUSPECT_STRIKES), which waits unless it is on trial.
    UPDATE router.turns t
    SET dispatch = t.dispatch + 1, on_trial = false,
        strikes = t.strikes + CASE WHEN t.strikes < 2 OR t.on_trial THEN p_strike ELSE 0 END
    FROM (SELECT DISTINCT s.session_id, s.turn_count + 1 AS number
          FROM router.messages m JOIN router.sessions s ON s.session_id = m.session_id
          WHERE m.partition = p_partition AND m.position >= from_position AND m.position > s.done_position) open
    WHERE t.session_id = open.session_id AND t.number = open.number AND t.status <> 3;
    RETURN QUERY
    SELECT m.position, m.message_id, m.kind, m.policy, m.deliver, m.fault, m.accept_ms, m.target_turn, m.traceparent,
           m.debounce_ms, m.debounce_max_ms, (extract(epoch FROM clock_timestamp() - m.ingest_time) * 1000)::bigint,
           s.session_id, s.tenant, s.agent, s.channel, s.session,
           s.done_position, s.control_position, s.turn_count, s.delivery_count, s.paused,
           t.turn_id, t.status, t.dispatch, t.strikes, t.first_position, t.last_position, t.agent_revision,
           t.stop, (extract(epoch FROM clock_timestamp() - t.stop_time) * 1000)::bigint,
           EXISTS (SELECT FROM router.turns b WHERE b.session_id = s.session_id AND b.number = s.turn_count AND b.outcome = 6
                   AND m.position BETWEEN b.first_position AND b.last_position),
           coalesce(m.ingest_time >= t.create_time, false), octet_length(m.content)
    FROM router.messages m
    JOIN router.sessions s ON s.session_id = m.session_id
    LEFT JOIN router.turns t ON t.session_id = s.session_id AND t.number = s.turn_count + 1 AND t.status <> 3
    WHERE m.partition = p_partition AND m.position >= from_position
      AND (m.position > s.done_position AND m.kind < 2
             AND NOT EXISTS (SELECT FROM router.turns r WHERE r.session_id = m.session_id AND r.number = -m.position)
           OR m.kind >= 2 AND m.position > s.control_position)
    ORDER BY m.position;
END
$$;

REVOKE ALL ON FUNCTION router.load_partition(integer, uuid, integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION router.load_partition(integer, uuid, integer) TO soma_router;

-- Both functions of the name: the one of the release before has been granted already.
DO $$
DECLARE f regprocedure;
BEGIN
    FOR f IN SELECT p.oid::regprocedure FROM pg_proc p
             WHERE p.pronamespace = 'router'::regnamespace AND p.proname = 'commit_group' LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', f);
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO soma_router', f);
    END LOOP;
END
$$;
