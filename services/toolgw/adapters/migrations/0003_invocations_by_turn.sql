-- The calls of a turn that may have changed something. A file of its own: while the index is made, calls wait to be
-- written but can be read.
CREATE INDEX invocations_by_turn ON toolgw.invocations (tenant, turn_id) WHERE effect <> 'none' AND turn_id <> '';
