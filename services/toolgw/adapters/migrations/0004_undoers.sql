-- Who carries out the undoing of a turn, and what another process needs to go on with it.
--
-- Processes of the release before go on: they write none of the columns. An undoing of theirs that was cut off goes on when
-- it is asked for again.

ALTER TABLE toolgw.reversals
    ADD COLUMN runner  uuid, -- null: nobody works on it
    ADD COLUMN agent   text, -- with `channel` and `session` the names behind `session_id`; set before anything is undone
    ADD COLUMN channel text,
    ADD COLUMN session text;
CREATE INDEX reversals_undoing ON toolgw.reversals (create_time) WHERE state = 'undoing';
