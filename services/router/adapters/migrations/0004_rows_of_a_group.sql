-- A group commit as rows: an array of a row type for each part of a group, where 0002 takes an array for each column.
--
-- An array costs by itself on both sides of the wire, full or empty, and each one in unnest() is a table of its own that is filled and read
-- again. A type never changes after its release: an older router writes it as it was. A newer function has types of its own.
CREATE TYPE router.group_fence AS (
    id integer, term uuid, head_old bigint, head bigint, mail_old bigint, mail bigint, floor bigint, seq_old bigint, stream text,
    seq bigint, batch text);
CREATE TYPE router.group_message AS (
    partition integer, position bigint, session_id bytea, message_id bytea, content_hash bytea, tenant text, kind smallint,
    policy smallint, deliver boolean, fault smallint, accept_ms bigint, target_turn bytea, traceparent text, content bytea,
    agent text, channel text, session text, debounce_ms integer, debounce_max_ms integer);
CREATE TYPE router.group_turn AS (
    turn_id bytea, session_id bytea, partition integer, tenant text, number bigint, first bigint, last bigint, revision text,
    fresh boolean);
CREATE TYPE router.group_revision AS (tenant text, agent text, revision text, spec bytea);
CREATE TYPE router.group_dispatch AS (turn_id bytea, dispatch integer, strikes integer, trial boolean);
CREATE TYPE router.group_control AS (session_id bytea, position bigint, turn_id bytea, stop smallint, paused boolean);
CREATE TYPE router.group_input AS (turn_id bytea, last bigint);
CREATE TYPE router.group_refusal AS (
    turn_id bytea, session_id bytea, partition integer, tenant text, position bigint, deliveries bigint, body bytea);
CREATE TYPE router.group_step AS (turn_id bytea, step integer, tenant text, kind smallint, dispatch integer, body bytea);
CREATE TYPE router.group_journaled AS (turn_id bytea, step integer, partition integer);
CREATE TYPE router.group_end AS (
    turn_id bytea, session_id bytea, partition integer, outcome smallint, base integer, steps integer, done bigint, number bigint,
    deliveries bigint);
CREATE TYPE router.group_delivery AS (
    partition integer, position bigint, session_id bytea, tenant text, channel text, payload bytea);
CREATE TYPE router.group_ack AS (partition integer, position bigint);
CREATE TYPE router.group_dead AS (
    tenant text, kind text, partition integer, ref bytea, reason smallint, message text, payload bytea);

-- One group of one router: many sessions, many tenants, one transaction, one round trip.
--
-- SM001: a fence failed; DETAIL lists the partitions that this caller does not hold any more. Nothing was written.
-- SM002: a turn is not as the caller believes; DETAIL lists the partitions concerned. Nothing was written.
--
-- `inserted` holds the positions of messages that were new; NULL: all were. `reused`: those of them whose message id was there with
-- another content. `started` holds the turns that were started; NULL: all were. `o_*` describe sessions of new messages as far as they
-- were there before.
--
-- `x BETWEEN y AND y` is `x = y` of which the planner can make one thing only, a look into the key's index for each row of the group. An
-- equality could be merged too, and lets it read the whole index in order instead, which is as good on the small table that it knows when
-- it plans and costs every group milliseconds when the table has grown (measured: 280 rows read per turn, fourfold tails, until the next
-- autoanalyze). `= ANY (ARRAY[y])` does the same and, unlike a range, lets the next column of the key narrow the search. A sum keeps
-- sessions_by_partition (0005) out of the search for a session.
--
-- The functions of the releases before stay beside it under their own parameters, so that routers of all of them can write.
CREATE FUNCTION router.commit_group(
    p_tenants text, p_fence router.group_fence[], p_messages router.group_message[], p_turns router.group_turn[],
    p_revisions router.group_revision[], p_dispatches router.group_dispatch[], p_controls router.group_control[],
    p_inputs router.group_input[], p_refusals router.group_refusal[], p_steps router.group_step[],
    p_journaled router.group_journaled[], p_ends router.group_end[], p_deliveries router.group_delivery[], p_acks router.group_ack[],
    p_dead router.group_dead[],
    OUT inserted bigint[], OUT inserted_partition integer[], OUT reused bigint[], OUT reused_partition integer[], OUT started bytea[],
    OUT o_session bytea[], OUT o_turns bigint[], OUT o_deliveries bigint[], OUT o_done bigint[], OUT o_paused boolean[]
) LANGUAGE plpgsql AS $$
DECLARE
    ignored text;
    found_count integer;
    sessions_count integer;
    is_clean boolean := false;
BEGIN
    ignored := set_config('soma.tenants', p_tenants, true);

    -- The fence: compare-and-set, serialisation and dense numbering at once. The caller sends partitions in order of id.
    UPDATE router.partitions p
    SET head = f.head, mail_head = f.mail, mail_floor = f.floor, cursor_stream = f.stream, cursor_seq = f.seq, cursor_batch = f.batch
    FROM unnest(p_fence) f
    WHERE p.id = f.id AND p.term = f.term AND p.head = f.head_old AND p.mail_head = f.mail_old AND p.cursor_seq = f.seq_old;
    GET DIAGNOSTICS found_count = ROW_COUNT;
    IF found_count <> cardinality(p_fence) THEN
        RAISE EXCEPTION 'fenced' USING ERRCODE = 'SM001', DETAIL = (
            SELECT string_agg(f.id::text, ',') FROM unnest(p_fence) f
            WHERE NOT EXISTS (SELECT FROM router.partitions p WHERE p.id = f.id AND p.xmin = pg_current_xact_id()::xid));
    END IF;

    IF cardinality(p_messages) > 0 THEN
        -- Nobody else writes messages of these sessions while the fence is held: what is not there now will not be there.
        SELECT count(DISTINCT m.message_id), count(DISTINCT m.session_id), bool_and(m.fault = 0)
        INTO found_count, sessions_count, is_clean
        FROM unnest(p_messages) m
        WHERE NOT EXISTS (SELECT FROM router.messages o WHERE o.message_id BETWEEN m.message_id AND m.message_id);
        IF found_count <> cardinality(p_messages) THEN
            -- Retries leave the group. 12, IDEMPOTENCY_KEY_REUSED: the key was used for another content.
            SELECT array_agg(n.position), array_agg(n.partition), count(DISTINCT n.session_id), false,
                   array_agg((n.partition, n.position, n.session_id, n.message_id, n.content_hash, n.tenant, n.kind, n.policy, n.deliver,
                              n.fault, n.accept_ms, n.target_turn, n.traceparent, n.content, n.agent, n.channel, n.session,
                              n.debounce_ms, n.debounce_max_ms)::router.group_message)
            INTO inserted, inserted_partition, sessions_count, is_clean, p_messages
            FROM (
                SELECT DISTINCT ON (m.message_id, m.content_hash) m.partition, m.position, m.session_id, m.message_id, m.content_hash,
                       m.tenant, m.kind, m.policy, m.deliver,
                       CASE WHEN m.fault = 0 AND EXISTS (SELECT FROM router.messages o
                                                         WHERE o.message_id BETWEEN m.message_id AND m.message_id
                                                           AND o.content_hash <> m.content_hash)
                            THEN 12 ELSE m.fault END AS fault,
                       m.accept_ms, m.target_turn, m.traceparent, m.content, m.agent, m.channel, m.session,
                       m.debounce_ms, m.debounce_max_ms
                FROM unnest(p_messages) m
                WHERE NOT EXISTS (SELECT FROM router.messages o
                                  WHERE o.message_id BETWEEN m.message_id AND m.message_id
                                    AND o.content_hash = m.content_hash)
                ORDER BY m.message_id, m.content_hash, m.position
            ) n;
            inserted := coalesce(inserted, '{}');
        END IF;
        IF NOT is_clean THEN
            SELECT array_agg(m.position), array_agg(m.partition) INTO reused, reused_partition
            FROM unnest(p_messages) m WHERE m.fault = 12;
        END IF;
    END IF;

    IF cardinality(p_messages) > 0 THEN
        INSERT INTO router.messages (partition, position, session_id, message_id, content_hash, tenant, kind, policy, deliver,
                                     fault, accept_ms, target_turn, traceparent, content, debounce_ms, debounce_max_ms)
        SELECT m.partition, m.position, m.session_id, m.message_id, m.content_hash, m.tenant, m.kind, m.policy, m.deliver,
               m.fault, m.accept_ms, m.target_turn, m.traceparent, m.content, m.debounce_ms, m.debounce_max_ms
        FROM unnest(p_messages) m;

        -- Updates first: nearly always all of the sessions are there, and an insert that meets a conflict costs more.
        WITH put AS (
            UPDATE router.sessions s
            SET message_count = s.message_count + n.messages, last_position = n.last, update_time = now()
            FROM (SELECT m.session_id, max(m.position) AS last, count(*) FILTER (WHERE m.kind < 2) AS messages
                  FROM unnest(p_messages) m GROUP BY m.session_id) n
            WHERE s.session_id BETWEEN n.session_id AND n.session_id
            RETURNING s.session_id, s.turn_count, s.delivery_count, s.done_position, s.paused
        )
        SELECT count(*), array_agg(session_id), array_agg(turn_count), array_agg(delivery_count), array_agg(done_position),
               array_agg(paused)
        INTO found_count, o_session, o_turns, o_deliveries, o_done, o_paused FROM put;
        IF found_count <> sessions_count THEN
            INSERT INTO router.sessions (session_id, partition, tenant, agent, channel, session, message_count, last_position)
            SELECT m.session_id, min(m.partition), min(m.tenant), min(m.agent), min(m.channel), min(m.session),
                   count(*) FILTER (WHERE m.kind < 2), max(m.position)
            FROM unnest(p_messages) m
            WHERE NOT EXISTS (SELECT FROM router.sessions s WHERE s.session_id BETWEEN m.session_id AND m.session_id)
            GROUP BY m.session_id;
        END IF;
    END IF;

    IF cardinality(p_revisions) > 0 THEN
        INSERT INTO router.agent_revisions (tenant, agent, revision, spec)
        SELECT r.tenant, r.agent, r.revision, r.spec FROM unnest(p_revisions) r
        ON CONFLICT DO NOTHING;
    END IF;

    IF cardinality(p_turns) > 0 THEN
        -- A turn may be started together with the message it answers (fresh): then only if that message was new and without fault.
        IF NOT is_clean THEN
            SELECT array_agg(t), coalesce(array_agg(t.turn_id), '{}') INTO p_turns, started FROM unnest(p_turns) t
            WHERE NOT t.fresh OR (t.partition, t.first) IN (SELECT m.partition, m.position FROM unnest(p_messages) m WHERE m.fault = 0);
        END IF;
        INSERT INTO router.turns (turn_id, session_id, partition, tenant, number, first_position, last_position, agent_revision)
        SELECT t.turn_id, t.session_id, t.partition, t.tenant, t.number, t.first, t.last, t.revision FROM unnest(p_turns) t;
    END IF;

    IF cardinality(p_dispatches) > 0 THEN
        UPDATE router.turns t SET dispatch = d.dispatch, strikes = d.strikes, on_trial = d.trial
        FROM unnest(p_dispatches) d
        WHERE t.turn_id BETWEEN d.turn_id AND d.turn_id AND t.status <> 3;
    END IF;

    -- Controls reach a session in order; the last pause or resume of the group counts. The first stop of a turn counts, except that a
    -- cancel also stops what was to be rolled back.
    IF cardinality(p_controls) > 0 THEN
        UPDATE router.sessions s
        SET control_position = greatest(s.control_position, c.position), paused = coalesce(c.paused[cardinality(c.paused)], s.paused)
        FROM (SELECT session_id, max(position) AS position, array_agg(paused ORDER BY place) FILTER (WHERE paused IS NOT NULL) AS paused
              FROM unnest(p_controls) WITH ORDINALITY AS i(session_id, position, turn_id, stop, paused, place)
              GROUP BY session_id) c
        WHERE s.session_id BETWEEN c.session_id AND c.session_id;
        UPDATE router.turns t
        SET status = 2, stop_time = coalesce(t.stop_time, now()),
            stop = CASE WHEN CASE t.status WHEN 1 THEN c.stop[1] ELSE t.stop END = 6 AND c.stop @> '{4}' THEN 4 ELSE c.stop[1] END
        FROM (SELECT turn_id, array_agg(stop ORDER BY place) AS stop
              FROM unnest(p_controls) WITH ORDINALITY AS i(session_id, position, turn_id, stop, paused, place)
              WHERE turn_id IS NOT NULL GROUP BY turn_id) c
        WHERE t.turn_id BETWEEN c.turn_id AND c.turn_id AND (t.status = 1 OR t.status = 2 AND t.stop = 6 AND c.stop @> '{4}');
    END IF;

    -- Further inputs of running turns.
    IF cardinality(p_inputs) > 0 THEN
        UPDATE router.turns t SET last_position = i.last
        FROM (SELECT turn_id, max(last) AS last FROM unnest(p_inputs) GROUP BY turn_id) i
        WHERE t.turn_id BETWEEN i.turn_id AND i.turn_id AND t.last_position < i.last;
    END IF;

    -- Messages that end before those that were there first. Their turns ran for nobody and have no number in the session: the position,
    -- negated, holds the place.
    IF cardinality(p_refusals) > 0 THEN
        INSERT INTO router.turns (turn_id, session_id, partition, tenant, number, first_position, last_position, status, outcome,
                                  step_count, agent_revision, end_time)
        SELECT q.turn_id, q.session_id, q.partition, q.tenant, -q.position, q.position, q.position, 3, 3, 1, '', now()
        FROM unnest(p_refusals) q;
        INSERT INTO router.steps (turn_id, step, tenant, kind, dispatch, body)
        SELECT q.turn_id, 1, q.tenant, 4, 1, q.body FROM unnest(p_refusals) q;
        UPDATE router.sessions s SET delivery_count = greatest(s.delivery_count, q.deliveries)
        FROM (SELECT session_id, max(deliveries) AS deliveries FROM unnest(p_refusals) GROUP BY session_id) q
        WHERE s.session_id BETWEEN q.session_id AND q.session_id;
    END IF;

    IF cardinality(p_steps) > 0 THEN
        INSERT INTO router.steps (turn_id, step, tenant, kind, dispatch, body)
        SELECT s.turn_id, s.step, s.tenant, s.kind, s.dispatch, s.body FROM unnest(p_steps) s;
    END IF;

    -- A step follows the one before it, in a turn that is open.
    IF cardinality(p_journaled) > 0 THEN
        UPDATE router.turns t SET step_count = j.step
        FROM unnest(p_journaled) j
        WHERE t.turn_id BETWEEN j.turn_id AND j.turn_id AND t.status <> 3 AND t.step_count = j.step - 1;
        GET DIAGNOSTICS found_count = ROW_COUNT;
        IF found_count <> cardinality(p_journaled) THEN
            RAISE EXCEPTION 'a step does not follow the journal of an open turn' USING ERRCODE = 'SM002', DETAIL = (
                SELECT string_agg(DISTINCT j.partition::text, ',') FROM unnest(p_journaled) j
                WHERE NOT EXISTS (SELECT FROM router.turns t
                                  WHERE t.turn_id = j.turn_id AND t.status <> 3 AND t.step_count = j.step));
        END IF;
    END IF;

    IF cardinality(p_ends) > 0 THEN
        UPDATE router.turns t SET status = 3, outcome = e.outcome, step_count = e.steps, end_time = now()
        FROM unnest(p_ends) e
        WHERE t.turn_id BETWEEN e.turn_id AND e.turn_id AND t.status <> 3 AND t.step_count = e.base;
        GET DIAGNOSTICS found_count = ROW_COUNT;
        IF found_count <> cardinality(p_ends) THEN
            RAISE EXCEPTION 'a turn that is to end is not running, or its journal is another' USING ERRCODE = 'SM002', DETAIL = (
                SELECT string_agg(DISTINCT e.partition::text, ',') FROM unnest(p_ends) e
                WHERE NOT EXISTS (SELECT FROM router.turns t
                                  WHERE t.turn_id = e.turn_id AND t.status = 3 AND t.end_time = now()));
        END IF;
        UPDATE router.sessions s
        SET done_position = e.done, turn_count = e.number, delivery_count = greatest(s.delivery_count, e.deliveries), update_time = now()
        FROM unnest(p_ends) e
        WHERE s.session_id BETWEEN e.session_id AND e.session_id AND s.partition + 0 = e.partition;
        GET DIAGNOSTICS found_count = ROW_COUNT;
        IF found_count <> cardinality(p_ends) THEN
            RAISE EXCEPTION 'a session is in another partition' USING ERRCODE = 'SM002',
                DETAIL = (SELECT string_agg(DISTINCT e.partition::text, ',') FROM unnest(p_ends) e);
        END IF;
    END IF;

    IF cardinality(p_deliveries) > 0 THEN
        INSERT INTO router.deliveries (partition, position, session_id, tenant, channel, payload)
        SELECT v.partition, v.position, v.session_id, v.tenant, v.channel, v.payload FROM unnest(p_deliveries) v;
    END IF;

    IF cardinality(p_acks) > 0 THEN
        DELETE FROM router.deliveries d USING unnest(p_acks) a
        WHERE d.partition = ANY (ARRAY[a.partition]) AND d.position BETWEEN a.position AND a.position;
    END IF;

    IF cardinality(p_dead) > 0 THEN
        INSERT INTO router.dead_letters (tenant, kind, partition, ref, reason, message, payload)
        SELECT x.tenant, x.kind, x.partition, x.ref, x.reason, x.message, x.payload FROM unnest(p_dead) x;
    END IF;
END
$$;

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
