"""The client kit: what a program outside the platform uses to talk to it.

`ChannelClient` keeps the stream of a channel adapter. docs/guides/channel-adapter.md shows how to write one with it.
"""

from soma_common.client.channel_client import ChannelClient, ClientClosed

__all__ = ["ChannelClient", "ClientClosed"]
