-- Tenants and agents can be paused. The default lets a process of the release before, which does not know the column, go
-- on writing rows while the others are replaced.

ALTER TABLE controlplane.tenants ADD COLUMN paused boolean NOT NULL DEFAULT false;
ALTER TABLE controlplane.agents  ADD COLUMN paused boolean NOT NULL DEFAULT false;
