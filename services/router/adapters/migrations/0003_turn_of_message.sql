-- The turn that answers a message: the newest that takes it, or the one of its refusal; none while it waits.
--
-- Turns of a session have the numbers from 1 without a gap, and their first positions never fall: halving finds the last one that begins
-- at or before the message. A search by range would walk through every turn of a long session.
-- Plans are made once per connection, on tables that may be empty then: the setting says what is right for full ones.
CREATE FUNCTION router.turn_of_message(p_session bytea, p_position bigint) RETURNS bytea
LANGUAGE plpgsql STABLE SET enable_seqscan = off AS $$
DECLARE
    answer bytea;
    low bigint := 0;
    high bigint;
    middle bigint;
BEGIN
    SELECT t.turn_id INTO answer FROM router.turns t WHERE t.session_id = p_session AND t.number = -p_position;
    IF FOUND THEN
        RETURN answer;
    END IF;
    -- The one that runs has the number after them.
    SELECT s.turn_count + 1 INTO high FROM router.sessions s WHERE s.session_id = p_session;
    WHILE low < high LOOP
        middle := (low + high + 1) / 2;
        PERFORM FROM router.turns t WHERE t.session_id = p_session AND t.number = middle AND t.first_position <= p_position;
        IF FOUND THEN
            low := middle;
        ELSE
            high := middle - 1;
        END IF;
    END LOOP;
    SELECT t.turn_id INTO answer FROM router.turns t
    WHERE t.session_id = p_session AND t.number = low AND low > 0 AND t.last_position >= p_position;
    RETURN answer;
END
$$;

REVOKE ALL ON FUNCTION router.turn_of_message(bytea, bigint) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION router.turn_of_message(bytea, bigint) TO soma_router;
