"""How the server sends mail, by one YAML file: `ropewalk serve --mail mail.yml`, or $ROPEWALK_MAIL. Without one it sends none.

from: Ropewalk <ropewalk@example.org>
url: https://ropewalk.example.org         where links in a mail lead: this server, as its readers reach it
host: smtp.example.org
port: 587
security: starttls                        or tls, from the first byte; or none, to this machine only
user: ropewalk
password_env: SMTP_PASSWORD               the environment variable that holds the password
digest_day: monday
digest_hour: 7                            UTC

Instead of a host, `spool: ./mail` writes each mail into a folder, from which another program sends it.
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, replace
from email.errors import MessageError
from email.headerregistry import Address
from email.policy import SMTP
from pathlib import Path
from urllib.parse import urlsplit

from ropewalk.config.document import read_document
from ropewalk.config.section import made, wrong

SECURITIES = ("starttls", "tls", "none")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
PORTS = {"starttls": 587, "tls": 465, "none": 25}
ENVIRONMENT = "ROPEWALK_MAIL"
# The addresses that are written in practice: no quoted words, no comments, a domain with a dot or this machine's.
ADDRESS = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@(?:localhost|[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})+)")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Mail:
    """The file."""

    sender: str = ""  # `from`: an address, perhaps with a name before it
    url: str = ""
    host: str = ""
    port: int = 0  # 0: the usual one
    security: str = "starttls"
    user: str = ""
    password_env: str = ""
    spool: str = ""  # a folder
    digest_day: str = "monday"
    digest_hour: int = 7  # UTC
    seconds: float = 30.0  # that the mail server has for each answer

    @property
    def address(self) -> Address:
        """Who mails are from."""
        return parse_sender(self.sender)

    @property
    def weekday(self) -> int:
        """Of the digest: 0 is Monday."""
        return DAYS.index(self.digest_day)


def read_mail(path: Path | str) -> Mail:
    """Reads the file; what is wrong with it is told with its line."""
    document = read_document(path)
    values = {("sender" if key == "from" else key): value for key, value in document.values.items() if key != "sender"}
    if "sender" in document.values:
        raise wrong(document, ("sender",), "unknown key 'sender'; did you mean 'from'?")
    mail = made(Mail, document, (), values)
    try:
        parse_sender(mail.sender)
    except ValueError:
        raise wrong(
            document, ("from",), f"from is '{mail.sender}'; expected an address, such as Ropewalk <ropewalk@example.org>"
        ) from None
    parts = urlsplit(mail.url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise wrong(document, ("url",), f"url is '{mail.url}'; expected where this server is reached, as https://...")
    if bool(mail.host) == bool(mail.spool):
        raise wrong(document, (), "mail needs one of host, a mail server, and spool, a folder")
    if mail.security not in SECURITIES:
        raise wrong(document, ("security",), f"security is '{mail.security}'; expected one of {', '.join(SECURITIES)}")
    if not 0 <= mail.port < 65_536:
        raise wrong(document, ("port",), f"port is {mail.port}; expected 1 to 65535")
    if bool(mail.user) != bool(mail.password_env):
        raise wrong(document, ("user",), "user and password_env are given together or not at all")
    if mail.password_env and not NAME.fullmatch(mail.password_env):
        # Not repeated: it may be the password itself.
        raise wrong(document, ("password_env",), "password_env is no name of an environment variable, such as SMTP_PASSWORD")
    if mail.security == "none" and mail.user and not _is_here(mail.host):
        raise wrong(document, ("security",), f"security: none would send a password in the clear to {mail.host}; use starttls")
    if mail.digest_day not in DAYS:
        raise wrong(document, ("digest_day",), f"digest_day is '{mail.digest_day}'; expected one of {', '.join(DAYS)}")
    if not 0 <= mail.digest_hour < 24:
        raise wrong(document, ("digest_hour",), f"digest_hour is {mail.digest_hour}; expected 0 to 23, UTC")
    if not 0 < mail.seconds <= 600:
        raise wrong(document, ("seconds",), f"seconds is {mail.seconds:g}; expected more than nothing and at most 600")
    spool = str((Path(path).resolve().parent / mail.spool).resolve()) if mail.spool else ""
    return replace(mail, url=mail.url.rstrip("/"), port=mail.port or PORTS[mail.security], spool=spool)


def configured_mail(path: Path | str | None = None) -> Mail | None:
    """The file that was named, else that of the environment, else None."""
    path = path or os.environ.get(ENVIRONMENT)
    return read_mail(path) if path else None


def parse_sender(text: str) -> Address:
    """`Name <address>` or an address; ValueError for anything else."""
    try:
        header = SMTP.header_factory("from", text)
        (found,) = header.addresses
    except (MessageError, IndexError) as error:
        raise ValueError(text) from error
    if header.defects or not ADDRESS.fullmatch(found.addr_spec):
        raise ValueError(text)
    return Address(found.display_name, addr_spec=found.addr_spec)


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
