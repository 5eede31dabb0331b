-- soma:no-transaction
-- What router.load_partition (0006) finds open sessions and controls by, however much has been said in the partition.
--
-- Without a lock, because these tables may be large and are written while this runs. What an interrupted run has left is of no use and goes.
-- Neither index costs a turn anything: a session never changes its partition, so its updates stay HOT; few messages are controls.
DROP INDEX CONCURRENTLY IF EXISTS router.sessions_by_partition;
CREATE INDEX CONCURRENTLY sessions_by_partition ON router.sessions (partition);
DROP INDEX CONCURRENTLY IF EXISTS router.messages_controls;
CREATE INDEX CONCURRENTLY messages_controls ON router.messages (partition, position) WHERE kind >= 2;
