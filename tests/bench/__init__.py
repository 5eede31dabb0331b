"""`make bench`: what a turn costs, as ratios and beside the limits of the machine."""

# The client is measured as an adapter runs it: the library says what gRPC reads when it is imported, so it comes first.
import soma_common as soma_common
