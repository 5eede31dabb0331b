-- soma:no-transaction
-- The turns of a tenant by an index that the writer cannot take for the key's (as 0007 for deliveries).
--
-- It ends in turn_id, and PostgreSQL 18 can skip the columns before. Where few times are known, as in a young table or after one large group,
-- that looked as good as the key: 22 pages for each turn that was looked up instead of 3, until the next autoanalyze. Those who list turns
-- say the condition, which all rows fulfil and no update touches.
--
-- Without a lock, because the table is written while this runs. What an interrupted run has left is of no use and goes.
DROP INDEX CONCURRENTLY IF EXISTS router.turns_of_tenant;
CREATE INDEX CONCURRENTLY turns_of_tenant ON router.turns (tenant, create_time, turn_id) WHERE partition >= 0;
DROP INDEX CONCURRENTLY IF EXISTS router.turns_by_tenant;
