"""`foedus coordinator authority show | rotate | retire`: one CA takes another's place, both trusted for a while."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from foedus_protocols.authorities import fingerprints
from foedus_protocols.console import Format, FormatOption, emit
from foedus_protocols.errors import StateError
from foedus_protocols.identity import human_fingerprint, spki_fingerprint
from rich.console import Console

from foedus_coordinator.cli_common import HomeOption, open_home, table
from foedus_coordinator.config import DEFAULT_HOME, Home

authority_app = typer.Typer(no_args_is_help=True, help="The federation's CA: look at it, replace it.")


@authority_app.command()
def show(home: HomeOption = DEFAULT_HOME, output: FormatOption = Format.text) -> None:
    """The trusted CAs, and which members follow."""
    opened = open_home(home)
    result = _state(opened)
    emit(result, output, lambda console: _show(console, result))


@authority_app.command()
def rotate(home: HomeOption = DEFAULT_HOME, output: FormatOption = Format.text) -> None:
    """Make a second CA. Members learn of it at their next hello, and get certificates of it."""
    opened = open_home(home)
    opened.authorities.rotate(opened.config.federation)
    result = _state(opened)

    def render(console: Console) -> None:
        _show(console, result)
        console.print("Next: `foedus coordinator authority retire`, once every member follows.")

    emit(result, output, render)


@authority_app.command()
def retire(
    force: Annotated[
        bool,
        typer.Option("--force", help="Also where members do not follow yet: they have to be invited again."),
    ] = False,
    home: HomeOption = DEFAULT_HOME,
    output: FormatOption = Format.text,
) -> None:
    """Trust the newest CA alone: certificates of the older one open nothing any more, and its key is erased."""
    opened = open_home(home)
    newest = opened.authority
    if len(opened.authorities.trusted()) < 2:
        raise StateError("expected a rotation that is going on, there is one CA only; see `authority rotate`")
    lagging = _lagging(opened, newest.fingerprint)
    if lagging and not force:
        raise StateError(
            f"expected every member to trust the new CA and to call with a certificate of it, {', '.join(lagging)} do "
            "not yet; wait until their daemons have connected, or lock them out with --force"
        )
    opened.show_under(newest)  # Before the older CA goes: the ports' certificate is of a trusted one at each instant.
    opened.members.revoke_other_issuers(newest.fingerprint)
    dropped = opened.authorities.retire()
    result = _state(opened) | {"retired": dropped, "locked_out": lagging}

    def render(console: Console) -> None:
        _show(console, result)
        for org in lagging:
            console.print(f"{org} is locked out until it joins again: foedus coordinator invite {org}")

    emit(result, output, render)


def _state(home: Home) -> dict[str, Any]:
    said = home.members.introductions()
    shown, newest = home.shown_ca, fingerprints(home.authorities.trusted())[-1]
    return {
        "authorities": [
            {
                "fingerprint": spki_fingerprint(ca),
                "created": ca.not_valid_before_utc.isoformat(),
                "expires": ca.not_valid_after_utc.isoformat(),
                "signs_members": spki_fingerprint(ca) == newest,
                "signs_ports": spki_fingerprint(ca) == shown,
                "trusted_by": sorted(org for org, one in said.items() if one and spki_fingerprint(ca) in one.trusts),
                "holders": sorted(org for org, one in said.items() if one and one.issuer == spki_fingerprint(ca)),
            }
            for ca in home.authorities.trusted()
        ],
        "lagging": _lagging(home, newest),
    }


def _lagging(home: Home, fingerprint: str) -> list[str]:
    """Members whose last hello did not come with a certificate of this CA, or did not say that they trust it."""
    return sorted(
        org
        for org, one in home.members.introductions().items()
        if one is None or fingerprint not in one.trusts or one.issuer != fingerprint
    )


def _show(console: Console, result: dict[str, Any]) -> None:
    rows = [
        [
            one["created"][:10],
            " and ".join(
                what for what, holds in (("members", one["signs_members"]), ("ports", one["signs_ports"])) if holds
            )
            or "-",
            ", ".join(one["trusted_by"]) or "-",
            ", ".join(one["holders"]) or "-",
        ]
        for one in result["authorities"]
    ]
    for one in result["authorities"]:
        console.print(f"CA {human_fingerprint(one['fingerprint'])}", soft_wrap=True)
    console.print(table(("CA of", "signs", "trusted by", "certificate held by"), rows))
    if len(result["authorities"]) > 1:
        console.print(f"do not follow yet: {', '.join(result['lagging']) or 'none'}", soft_wrap=True)
