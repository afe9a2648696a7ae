"""Which proxy is dialled through, and that its password is seen nowhere."""

from __future__ import annotations

import pytest
from foedus_protocols.errors import ConfigError, UsageError
from foedus_protocols.proxy import choose, require_no_credentials

pytestmark = pytest.mark.unit

HOST = "coordinator.example.org"


def test_the_configuration_wins_over_the_environment() -> None:
    found = choose("http://ours:1", HOST, {"HTTPS_PROXY": "http://theirs:2", "NO_PROXY": "*"})
    assert found is not None
    assert (found.url, found.source, found.shown) == ("http://ours:1", "client.toml", "ours:1")


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy"])
@pytest.mark.parametrize("value", ["http://proxy:3128", "proxy:3128", "http://proxy:3128/"])
def test_the_environment_is_asked_in_both_spellings(name: str, value: str) -> None:
    found = choose(None, HOST, {name: value})
    assert found is not None
    assert (found.url, found.source) == ("http://proxy:3128", name)


def test_other_variables_are_not_looked_at() -> None:
    assert (
        choose(None, HOST, {"http_proxy": "http://a:1", "grpc_proxy": "http://b:2", "ALL_PROXY": "http://c:3"}) is None
    )
    assert choose(None, HOST, {"HTTPS_PROXY": ""}) is None


@pytest.mark.parametrize(
    ("host", "exceptions", "direct"),
    [
        (HOST, "coordinator.example.org", True),
        (HOST, "example.org", True),
        (HOST, ".example.org", True),
        (HOST, "*.example.org", True),
        (HOST, "other.org, EXAMPLE.ORG", True),
        (HOST, "example.org:443", True),
        (HOST, "*", True),
        (HOST, "ample.org", False),
        (HOST, "org.example", False),
        (HOST, "10.0.0.0/8", False),
        (HOST, "", False),
        (HOST, " , ", False),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3", "10.1.2.4", False),
        ("10.1.2.3", "192.168.0.0/16", False),
        ("10.1.2.3", "not/a/network", False),
        ("[fd00::7]", "fd00::/8", True),
    ],
)
def test_no_proxy_names_hosts_suffixes_addresses_and_networks(host: str, exceptions: str, direct: bool) -> None:
    found = choose(None, host, {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": exceptions})
    assert (found is None) is direct


def test_a_password_is_used_and_never_shown() -> None:
    found = choose(None, HOST, {"https_proxy": "http://user:s3cret@proxy:3128"})
    assert found is not None
    assert found.url == "http://user:s3cret@proxy:3128"
    assert "s3cret" not in repr(found) + found.shown
    assert found.shown == "proxy:3128"


@pytest.mark.parametrize("value", ["https://user:s3cret@proxy:1", "socks5://proxy:1", "http://", "http://proxy:port"])
def test_another_kind_of_proxy_is_refused_and_not_passed_by(value: str) -> None:
    with pytest.raises(ConfigError, match="HTTPS_PROXY") as error:
        choose(None, HOST, {"HTTPS_PROXY": value})
    assert "s3cret" not in str(error.value)


def test_a_password_as_an_argument_is_refused() -> None:
    require_no_credentials("http://proxy:3128")
    with pytest.raises(UsageError, match="HTTPS_PROXY") as error:
        require_no_credentials("http://user:s3cret@proxy:3128")
    assert "s3cret" not in str(error.value)
