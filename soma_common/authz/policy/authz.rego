# Who may do what. Input:
#   {"subject": {"id": "...", "tenant": "demo" or "*", "roles": ["channel"]}, "permission": "turns.read", "tenant": "demo"}
# `tenant` is the tenant that the call touches, "" for calls that touch none in particular. Data: roles.json.
# The answer holds only a boolean and constant reason codes, never text from the input.
package soma.authz

import rego.v1

default permitted := false

permitted if {
	some role in input.subject.roles
	some granted in data.roles[role].permissions
	granted in {"*", input.permission}
}

default tenant_allowed := false

tenant_allowed if input.subject.tenant == "*"

tenant_allowed if {
	input.tenant != ""
	input.tenant == input.subject.tenant
}

default allow := false

allow if {
	permitted
	tenant_allowed
}

reasons contains "permission_missing" if not permitted

reasons contains "tenant_mismatch" if {
	not tenant_allowed
	input.tenant != ""
}

reasons contains "all_tenants_required" if {
	not tenant_allowed
	input.tenant == ""
}

decision := {"allow": allow, "reasons": sort([reason | some reason in reasons])}
