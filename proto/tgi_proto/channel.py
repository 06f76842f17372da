"""Where the shards' sockets are and how channels to them are set up.

The socket of rank r is `{prefix}-{r}` (TGI's scheme, `--shard-uds-path`).
"""

MAX_MESSAGE_BYTES = 2**31 - 1

CHANNEL_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A shard that is restarted must be found again at once, not after gRPC's default back-off of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    # Every channel to a restarted shard needs its own connection, not a cached dead one.
    ("grpc.use_local_subchannel_pool", 1),
    # gRPC has no use for a proxy on a Unix socket; some environments set one for everything.
    ("grpc.enable_http_proxy", 0),
]

SERVER_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]


def socket_path(uds_path: str, rank: int) -> str:
    """File system path of the Unix socket of `rank`."""
    return f"{uds_path}-{rank}"


def address(uds_path: str, rank: int) -> str:
    """gRPC address of `rank`."""
    return f"unix:{socket_path(uds_path, rank)}"
