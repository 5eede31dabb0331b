-- A take-over costs as much as is open, not as much as has been said since the oldest message that waits.

-- A turn is written when it starts and when it ends, by groups that fill pages: with room for a second version of each row, an update
-- is HOT and writes to no index (measured under load: 64 % of them before, all of them now). For pages from now on.
ALTER TABLE router.turns SET (fillfactor = 50);

-- What a new owner must know, as before: the same rows for the same tables.
--
-- One message that waits in a paused session keeps mail_floor where it is, while others are answered above it without end: with the floor
-- far behind, to walk through all messages above it takes longer than a lease lasts. Then the sessions are asked whether they have more
-- than was done. With the floor near, the messages above it are fewer than the sessions, and name theirs.
-- A message that is pending is not below the floor, and above the done_position of its session: so is the session's last one. Controls are
-- done with apart from the messages, so a session may have one of them open and nothing else: they are found by an index of their own.
--
-- Plans are made once per connection, on tables that may be empty then: the settings say what is right for full ones.
CREATE OR REPLACE FUNCTION router.load_partition(p_partition integer, p_term uuid, p_strike integer)
RETURNS TABLE (
    "position" bigint, message_id bytea, kind smallint, policy smallint, deliver boolean, fault smallint, accept_ms bigint,
    target_turn bytea, traceparent text, debounce_ms integer, debounce_max_ms integer, age_ms bigint,
    session_id bytea, tenant text, agent text, channel text, session text,
    done_position bigint, control_position bigint, turn_count bigint, delivery_count bigint, paused boolean,
    turn_id bytea, status smallint, dispatch integer, strikes integer, first_position bigint, last_position bigint, agent_revision text,
    stop smallint, stop_age_ms bigint, rolled_back boolean, came_later boolean, size integer
) LANGUAGE plpgsql SECURITY DEFINER SET search_path = router, pg_temp
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    from_position bigint;
    to_position bigint;
    lively bytea[];
BEGIN
    SELECT p.mail_floor, p.mail_head INTO from_position, to_position
    FROM router.partitions p WHERE p.id = p_partition AND p.term = p_term;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'fenced' USING ERRCODE = 'SM001', DETAIL = p_partition::text;
    END IF;
    IF to_position - from_position < 10000 THEN
        lively := ARRAY(
            SELECT s.session_id
            FROM (SELECT DISTINCT m.session_id FROM router.messages m
                  WHERE m.partition = p_partition AND m.position >= from_position) n
            JOIN router.sessions s ON s.session_id = n.session_id
            WHERE s.last_position >= from_position AND s.last_position > s.done_position);
    ELSE
        lively := ARRAY(
            SELECT s.session_id FROM router.sessions s
            WHERE s.partition = p_partition AND s.last_position >= from_position AND s.last_position > s.done_position);
    END IF;
    -- From the second strike on a turn is a suspect (dispatch_turns.py: SUSPECT_STRIKES), which waits unless it is on trial.
    UPDATE router.turns t
    SET dispatch = t.dispatch + 1, on_trial = false,
        strikes = t.strikes + CASE WHEN t.strikes < 2 OR t.on_trial THEN p_strike ELSE 0 END
    FROM unnest(lively) o(session_id) JOIN router.sessions s ON s.session_id = o.session_id
    WHERE t.session_id = s.session_id AND t.number = s.turn_count + 1 AND t.status <> 3;
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
    FROM (
        SELECT w.position
        FROM unnest(lively) o(session_id) JOIN router.sessions e ON e.session_id = o.session_id
        -- By the session's own index: not merged with the rest, where another would be in reach.
        CROSS JOIN LATERAL (SELECT i.position FROM router.messages i
                            WHERE i.session_id = e.session_id AND i.position > e.done_position AND i.position >= from_position
                              AND i.kind < 2 OFFSET 0) w
        WHERE NOT EXISTS (SELECT FROM router.turns r WHERE r.session_id = e.session_id AND r.number = -w.position)
        UNION ALL
        SELECT c.position
        FROM router.messages c JOIN router.sessions e ON e.session_id = c.session_id
        WHERE c.partition = p_partition AND c.position >= from_position AND c.kind >= 2 AND c.position > e.control_position
    ) pending
    JOIN router.messages m ON m.partition = p_partition AND m.position = pending.position
    JOIN router.sessions s ON s.session_id = m.session_id
    LEFT JOIN router.turns t ON t.session_id = s.session_id AND t.number = s.turn_count + 1 AND t.status <> 3
    ORDER BY m.position;
END
$$;
