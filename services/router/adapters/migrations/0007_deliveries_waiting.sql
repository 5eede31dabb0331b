-- soma:no-transaction
-- The deliveries of a channel by an index that acknowledgements cannot take for their own.
--
-- An ack is looked up by its place, the key. In a table that was large and is empty every plan costs the same, and since PostgreSQL 18 can skip
-- columns, the one over (partition, tenant, channel, position) was taken at times: eight searches and 34 pages for an ack instead of one and
-- four, until the next autoanalyze. A partial index is not for those who do not say its condition; all positions fulfil it.
--
-- Without a lock, because the table is written while this runs. What an interrupted run has left is of no use and goes.
DROP INDEX CONCURRENTLY IF EXISTS router.deliveries_waiting;
CREATE INDEX CONCURRENTLY deliveries_waiting ON router.deliveries (partition, tenant, channel, position) WHERE position > 0;
DROP INDEX CONCURRENTLY IF EXISTS router.deliveries_by_channel;
