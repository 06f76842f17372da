"""What both ends of the shard socket agree on: messages, method names, channel options, log records.

Imported by the launcher, the router and the shard. Imports none of them, nor torch, nor aiohttp.
"""
