"""Mail: one message to one address, handed to a mail server, or written into a folder."""

from __future__ import annotations

import asyncio
import os
import secrets
import smtplib
import ssl
from contextlib import suppress
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import formatdate, make_msgid
from pathlib import Path

from ropewalk.config.mail import ADDRESS, Mail
from ropewalk.errors import BadInput, MailFailed, OutputError
from ropewalk.folders import make_folder

LONGEST = 254  # characters of an address (RFC 5321, section 4.5.3.1.3)
POLICY = SMTP.clone(cte_type="7bit")  # what every server takes
WHOLE = POLICY.clone(
    max_line_length=998
)  # of headers: an address that is folded is written in a way that mail programs do not follow


class Mailer:
    """Sends what is handed to it, one after another."""

    def __init__(self, settings: Mail) -> None:
        if settings.password_env and not os.environ.get(settings.password_env):
            raise BadInput(f"${settings.password_env} is not set; mail.yml says that it holds the mail server's password")
        self.settings = settings
        self._turn = asyncio.Lock()

    async def send(self, message: EmailMessage) -> None:
        """Hands one message over; MailFailed says whether another try may help, OutputError is a folder's."""
        async with self._turn:
            await asyncio.to_thread(_spool if self.settings.spool else _deliver, self.settings, message)


def compose(settings: Mail, to: str, subject: str, text: str, html: str, leave_url: str | None = None) -> EmailMessage:
    """A message in both forms; with `leave_url`, one that a mail program can unsubscribe from with one click (RFC 8058)."""
    message = EmailMessage(policy=POLICY)
    message["From"] = settings.address
    message["To"] = Address(addr_spec=to)
    message["Subject"] = subject
    message["Date"] = formatdate()
    message["Message-ID"] = make_msgid(domain=settings.address.domain)
    message["Auto-Submitted"] = "auto-generated"
    if leave_url is not None:
        message["List-Unsubscribe"] = f"<{leave_url}>"
        if leave_url.startswith("https://"):  # by nothing else may it be asked for, RFC 8058 says
            message["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"
    message.set_content(text)
    message.add_alternative(html, subtype="html")
    return message


def check_address(text: str) -> str:
    """The address as it is written to; BadInput for what is none."""
    found = text.strip()
    if len(found) > LONGEST or not ADDRESS.fullmatch(found):
        raise BadInput(f"{found[:80]!r} is no mail address; expected one such as name@example.org")
    local, _, domain = found.rpartition("@")
    return f"{local}@{domain.lower()}"


def _spool(settings: Mail, message: EmailMessage) -> None:
    folder, name = Path(settings.spool), f"{secrets.token_hex(12)}.eml"
    try:
        make_folder(folder)
        part = folder / f".{name}.part"
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(message.as_bytes(policy=WHOLE))
            file.flush()
            os.fsync(file.fileno())
        part.rename(folder / name)
    except OSError as error:
        raise OutputError(f"cannot write a mail to {folder}: {error.strerror or error}; see `spool` in mail.yml") from error


def _deliver(settings: Mail, message: EmailMessage) -> None:
    where = f"the mail server {settings.host}:{settings.port}"
    to = message["To"].addresses[0].addr_spec
    try:
        server = _connect(settings)
    except (OSError, smtplib.SMTPException) as error:
        raise MailFailed(f"{where} cannot be reached or used: {_told(error)}", again=True) from error
    try:
        for code, reply in _envelope(server, settings, to):
            if code >= 400:
                raise MailFailed(f"{where} refused a mail: {code} {_words(reply)}", again=code < 500)
        try:
            code, reply = server.data(message.as_bytes(policy=WHOLE))
        except smtplib.SMTPDataError as error:
            code, reply = error.smtp_code, _words(error.smtp_error).encode()
        except (OSError, smtplib.SMTPException) as error:
            # It may have been taken: sending once more could be sending twice.
            raise MailFailed(f"{where} did not say whether it took a mail: {_told(error)}", again=False) from error
        if code >= 400:
            raise MailFailed(f"{where} refused a mail: {code} {_words(reply)}", again=code < 500)
        with suppress(OSError, smtplib.SMTPException):
            server.quit()
    finally:
        server.close()


def _connect(settings: Mail) -> smtplib.SMTP:
    context = ssl.create_default_context() if settings.security != "none" else None
    server: smtplib.SMTP
    if settings.security == "tls":
        server = smtplib.SMTP_SSL(settings.host, settings.port, timeout=settings.seconds, context=context)
    else:
        server = smtplib.SMTP(settings.host, settings.port, timeout=settings.seconds)
    try:
        if settings.security == "starttls":
            server.starttls(context=context)
        if settings.user:
            server.login(settings.user, os.environ[settings.password_env])
        server.ehlo_or_helo_if_needed()
    except BaseException:
        server.close()
        raise
    return server


def _envelope(server: smtplib.SMTP, settings: Mail, to: str) -> list[tuple[int, bytes]]:
    try:
        answers = [server.mail(settings.address.addr_spec)]
        if answers[0][0] < 400:
            answers.append(server.rcpt(to))
    except (OSError, smtplib.SMTPException) as error:
        raise MailFailed(f"the mail server {settings.host}:{settings.port} went away: {_told(error)}", again=True) from error
    return answers


def _told(error: BaseException) -> str:
    if isinstance(error, smtplib.SMTPResponseException):
        return f"{error.smtp_code} {_words(error.smtp_error)}"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:200]


def _words(reply: bytes | str) -> str:
    text = reply.decode("ascii", "replace") if isinstance(reply, bytes) else reply
    return "".join(c if c.isprintable() else " " for c in text)[:200]
