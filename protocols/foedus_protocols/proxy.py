"""Which proxy to dial through: the configured one, else the one that the environment names.

``HTTPS_PROXY`` (or ``https_proxy``) and ``NO_PROXY`` mean what they mean to curl. gRPC by itself looks at other names
in another order and passes by what it does not understand, so it is told what was chosen here and looks at none.

A proxy's user and password are secrets: they may stand in the configuration file and in a variable, never in an
argument, and `Proxy.shown` is without them.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

from foedus_protocols.errors import ConfigError, UsageError

_VARIABLES = ("HTTPS_PROXY", "https_proxy")
_EXCEPTIONS = ("NO_PROXY", "no_proxy")


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """A proxy for CONNECT.

    Attributes:
        url: ``http://[USER:PASSWORD@]HOST:PORT``.
        source: Where it was named: ``client.toml`` or a variable.
        shown: The proxy without user and password, for logs.
    """

    url: str = field(repr=False)
    source: str
    shown: str


def choose(configured: str | None, host: str, environment: Mapping[str, str] | None = None) -> Proxy | None:
    """The proxy to reach a host through; None to dial directly.

    Args:
        configured: The configuration's proxy, which wins over the environment.
        host: Name or address of the other side, without a port.
        environment: Variables; those of this process where absent.

    Raises:
        ConfigError: The proxy that was found is not ``http://HOST:PORT``.
    """
    variables = os.environ if environment is None else environment
    if configured:
        return _proxy(configured, "client.toml")
    name = next((name for name in _VARIABLES if variables.get(name)), None)
    if name is None or _excepted(host, next((variables[each] for each in _EXCEPTIONS if variables.get(each)), "")):
        return None
    return _proxy(variables[name], name)


def require_no_credentials(argument: str) -> None:
    """Refuse a proxy with a password as an argument: arguments are visible to every user of the machine.

    Raises:
        UsageError: It has a user or a password.
        ConfigError: It is no proxy.
    """
    if "@" in argument:
        raise UsageError(
            "expected --proxy http://HOST:PORT without user and password, which every user of this machine could read "
            "in the list of processes: set HTTPS_PROXY, or write `proxy` into client.toml"
        )
    _proxy(argument, "--proxy")


def _proxy(text: str, source: str) -> Proxy:
    url = text if "://" in text else f"http://{text}"
    parts = _split(url)
    if parts is None or parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/") or parts.query:
        raise ConfigError(
            f"expected a proxy as http://HOST:PORT in {source}, got something else; TLS to the proxy itself (https://) "
            "is not supported, what goes through it is encrypted in any case"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    shown = host if parts.port is None else f"{host}:{parts.port}"
    return Proxy(url=url.rstrip("/"), source=source, shown=shown)


def _split(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        _ = parts.port  # A port that is none raises here.
    except ValueError:
        return None
    return parts


def _excepted(host: str, exceptions: str) -> bool:
    """Whether a host is in a NO_PROXY list: names with what is below them, addresses, networks, or ``*``."""
    host = host.strip("[]").rstrip(".").lower()
    return any(_matches(host, entry.strip().lower()) for entry in exceptions.split(",") if entry.strip())


def _matches(host: str, entry: str) -> bool:
    if entry == "*":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = entry.rpartition(":")[0] if entry.rpartition(":")[2].isdigit() else entry
        name = name.removeprefix("*").lstrip(".").rstrip(".")
        return bool(name) and (host == name or host.endswith(f".{name}"))
    try:
        return address in ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:
        return False
