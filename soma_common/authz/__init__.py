"""Who calls, and what they may do.

`tokens` verifies bearer tokens, `engine` evaluates the Rego policy in `policy/`, `authorizer` puts both behind one
door with caches. What a method needs stands in its contract: `option (soma.common.v1.authz)`.
"""
