"""Addresses of remote teachers as users write them."""

from megatron_hylo.config import ConfigError


def parse_address(address: str) -> tuple[str, int]:
    """Parse "HOST:PORT", ":PORT" or "PORT" into (host, port); 127.0.0.1 where no host is given.

    Raises:
        ConfigError: no port of 1 to 65535.
    """
    host, _, port = address.strip().rpartition(":")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536) or ":" in host.strip("[]") and host[:1] != "[":
        raise ConfigError(
            f"teacher address {address!r} must be HOST:PORT, e.g. node7:29600 or [::1]:29600, or a PORT of 127.0.0.1, "
            f"with a port from 1 to 65535"
        )
    return host.strip("[]") or "127.0.0.1", int(port)


def replica_address(addresses: str, replica: int) -> tuple[str, int]:
    """Address of one replica: its own out of several separated by commas, or the only one with its index added to the port.

    Raises:
        ConfigError: fewer addresses than copies.
    """
    parsed = [parse_address(address) for address in addresses.split(",")]
    if len(parsed) == 1:
        return parse_address(f"[{parsed[0][0]}]:{parsed[0][1] + replica}")
    if replica >= len(parsed):
        raise ConfigError(
            f"{len(parsed)} teacher addresses ({addresses}) are too few for copy {replica} of the teacher: give one a copy"
        )
    return parsed[replica]
