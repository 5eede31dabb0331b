"""Where the product keeps each guard of the model: the code that a reader of a counterexample looks at next.

A place is `module:symbol`, or `file.sql:text` for rules that the database keeps. The table is held against the code by
`tests/contract/test_model_agreement.py`.
"""

from typing import Final

ROUTER: Final = "services.router.application"
SCHEMA: Final = "services/router/adapters/migrations/0001_turn_engine.sql"
POLICIES: Final = "services/router/adapters/migrations/0002_policies.sql"
GROUPS: Final = "services/router/adapters/migrations/0004_rows_of_a_group.sql"
TOOL_SCHEMA: Final = "services/toolgw/adapters/migrations/0001_invocations.sql"
TOOL_STORE: Final = "services.toolgw.adapters.store_postgres:PostgresToolStore"

PLACES: Final[dict[str, tuple[str, ...]]] = {
    "fence": (f"{SCHEMA}:p.term = f.term",),
    "fence_lock": (f"{SCHEMA}:UPDATE router.partitions p",),
    "load_after": (f"{ROUTER}.own_partitions:OwnPartitions._take", f"{SCHEMA}:FUNCTION router.load_partition"),
    "cursor_cas": (f"{SCHEMA}:p.cursor_seq = f.seq_old",),
    "dedupe": (f"{SCHEMA}:UNIQUE INDEX messages_idempotency ON router.messages (message_id, content_hash)",),
    "purge_committed": ("services.router.adapters.inbound_nats:LaneReader.purge",),
    "step_cas": (f"{ROUTER}.run_turns:TurnRunner.on_proposals", f"{SCHEMA}:PRIMARY KEY (turn_id, step)"),
    "dispatch_id": (f"{ROUTER}.run_turns:TurnRunner.on_proposals", f"{SCHEMA}:SET dispatch = t.dispatch + 1"),
    "confirm": (
        f"{ROUTER}.run_turns:TurnRunner._journaled",
        "services.cognition.application.running_turn:RunningTurn.record",
    ),
    "tool_key": ("services.toolgw.adapters.store_postgres:PostgresToolStore.claim",),
    "replay": ("services.cognition.domain.turn:replay", "services.router.domain.turn:replay"),
    "unique_term": (f"{ROUTER}.own_partitions:OwnPartitions._take",),
    "term_ends": (f"{ROUTER}.own_partitions:OwnPartitions.end_all",),
    "anchor": (
        "services.router.adapters.inbound_nats:LaneReader._check_cursors",
        "services.router.adapters.inbound_nats:LaneReader.purge",
    ),
    "inputs_seen": (f"{ROUTER}.run_turns:TurnRunner._take",),
    "tombstone": (
        f"{ROUTER}.stop_turns:Stopper.converge",
        "services.toolgw.adapters.store_postgres:PostgresToolStore.cancel",
    ),
    "held": (f"{ROUTER}.run_turns:TurnRunner._hold",),
    "whole": (f"{GROUPS}:a turn that is to end is not running", f"{ROUTER}.commit_group:GroupCommitter._without_ends"),
    "withdrawn": (f"{ROUTER}.start_ahead:StartsAhead.is_spent", f"{ROUTER}.run_turns:TurnRunner._started"),
    "floor_durable": (f"{SCHEMA}:TABLE router.deliveries", f"{ROUTER}.deliver_outcomes:DeliveryDesk.adopt"),
    "floor_acked": (f"{ROUTER}.deliver_outcomes:DeliveryDesk.on_acks", f"{ROUTER}.outcomes:AckItem"),
    "one_unacked": (f"{ROUTER}.deliver_outcomes:DeliveryDesk._send",),
    "rendezvous": ("services.router.domain.adapters:choose",),
    "client_dedupe": ("soma_common.client.inbox:Inbox.arrive",),
    "ack_again": ("soma_common.client.channel_client:ChannelClient._show",),
    "resume": (
        f"{ROUTER}.deliver_outcomes:DeliveryDesk._was_processed",
        "soma_common.client.inbox:Inbox.processed",
    ),
    "start_journaled": (f"{ROUTER}.items:StartItem",),
    "suspects_alone": (f"{ROUTER}.dispatch_turns:Dispatcher._next_suspect",),
    "strikes_durable": (f"{SCHEMA}:strikes = t.strikes + p_strike",),
    "unique_key": (f"{TOOL_SCHEMA}:PRIMARY KEY (tenant, key)", f"{TOOL_STORE}.claim"),
    "claim_first": ("services.toolgw.application.run_tool:ToolRuns._live",),
    "never_again": ("services.toolgw.application.run_once:RunOnce._replace_runner",),
    "one_end": (f"{TOOL_STORE}.finish", f"{TOOL_STORE}.end_without_result"),
    "call_tombstone": (f"{TOOL_STORE}.cancel",),
    "give_up": ("services.toolgw.application.cancel_invocation:CancelInvocation._give_up",),
    "doubt_stays": ("services.toolgw.domain.reversal:PastCall.may_have_effect",),
    "first_look": ("services.toolgw.domain.reversal:first_look", f"{TOOL_STORE}.begin_reversal"),
    "undo_key": ("services.toolgw.domain.reversal:PastCall.undone_in",),
    "gone_settles": ("services.toolgw.application.revert_turn:RevertTurn._end_of",),
    "due_durable": (f"{POLICIES}:ADD COLUMN ingest_time", f"{ROUTER}.restore_sessions:_message"),
    "policy_stored": (f"{ROUTER}.ingest_messages:Ingest._set_policy", f"{POLICIES}:ADD COLUMN debounce_max_ms"),
    "due_restored": (f"{ROUTER}.restore_sessions:restore_sessions", f"{ROUTER}.take_arrivals:Arrivals.ready"),
    "neighbours": ("services.router.domain.arrival:next_inputs", "services.router.domain.arrival:due_in_s"),
    "group_journaled": (f"{ROUTER}.items:StartItem.write", f"{POLICIES}:number, first_position, last_position"),
    "group_seen": (f"{ROUTER}.run_turns:TurnRunner._take",),
    "stop_durable": (f"{ROUTER}.stop_turns:Stopper.stored", f"{POLICIES}:SET status = 2, stop_time"),
    "stop_kind": (f"{ROUTER}.items:ControlItem.write", f"{POLICIES}:ADD COLUMN stop "),
    "stop_resumed": (f"{ROUTER}.run_turns:TurnRunner.resume",),
    "first_stop": (f"{ROUTER}.stop_turns:Stopper.stop", f"{POLICIES}:WHEN 1 THEN c.stop[1] ELSE t.stop END"),
    "cancel_beats": (f"{ROUTER}.stop_turns:Stopper.stop", f"{POLICIES}:= 6 AND c.stop @> '{{4}}' THEN 4"),
    "asks_tools": (f"{ROUTER}.stop_turns:Stopper._undone",),
    "asked_after": (f"{ROUTER}.stop_turns:Stopper.converge",),
    "absorbed_waits": (f"{ROUTER}.outcomes:EndItem.write",),
    "new_turn_id": ("services.router.domain.arrival:replacement", f"{ROUTER}.start_turns:Starter._new_turn"),
    "try_remembered": (f"{POLICIES}:b.number = s.turn_count AND b.outcome = 6",),
    "refusal_row": (f"{ROUTER}.outcomes:RefusalItem.write", f"{POLICIES}:r.number = -m.position"),
    "refusal_first": (f"{ROUTER}.start_turns:Starter._next_of",),
}

ELSEWHERE: Final[dict[str, str]] = {
    "consumer_dedupe": "events for the outside are not part of this release",
    "relay_from_stream": "events for the outside are not part of this release",
    "relay_cas": "events for the outside are not part of this release",
    "event_ids": "events for the outside are not part of this release",
    "purge_replicated": "the standalone PostgreSQL has no standby",
}
