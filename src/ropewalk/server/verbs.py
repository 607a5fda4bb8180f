"""The arguments of `serve`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ropewalk.verbs import Verbs, add_verb, settings_of, store_arguments

if TYPE_CHECKING:
    from ropewalk.config.serving import Serving


def add_verbs(verbs: Verbs) -> None:
    """`serve`."""
    serve = add_verb(verbs, "serve", "the API and its pages, on one port", "ropewalk serve --port 8700", _serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, for this machine only)")
    serve.add_argument("--port", type=int, default=8700, help="0: any free one (default: %(default)s)")
    store_arguments(serve)
    serve.add_argument(
        "--models", type=Path, metavar="YAML", help="which models are served, and how (default: all that are published)"
    )
    serve.add_argument(
        "--engine",
        choices=("own", "vllm"),
        help="what writes: this machine's engine, or a vLLM server (default: vllm where the file of models names one, else own)",
    )
    serve.add_argument("--vllm-url", metavar="URL", help="the vLLM server, such as http://gpu:8000; its key is in VLLM_API_KEY")
    serve.add_argument(
        "--vllm-base",
        metavar="NAME",
        help="the base that it serves, by its name here (default: the only one that is published)",
    )
    serve.add_argument("--preload", nargs="+", default=[], metavar="NAME", help="models to load before the first question")
    serve.add_argument(
        "--mail",
        type=Path,
        metavar="YAML",
        help="how mail is sent, for the weekly digest (default: $ROPEWALK_MAIL, else none is)",
    )
    serve.add_argument("--max-file-mb", type=float, default=500, metavar="MB", help="largest file (default: %(default)s)")
    serve.add_argument(
        "--requests-per-minute", type=int, metavar="N", help="of each workspace without a limit of its own (default: no limit)"
    )
    serve.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="trainings run at once by this process; 0: none (default: %(default)s)"
    )
    for option, default, what in (
        ("--jobs-running", "1", "trainings of each workspace at a time"),
        ("--jobs-queued", "20", "trainings of each workspace that have not ended"),
        ("--jobs-file-bytes", "2GB", "files of all these together"),
    ):
        metavar = "SIZE" if default.endswith("GB") else "N"
        serve.add_argument(
            option, default=default, metavar=metavar, help=f"{what}, where it has no limit of its own (default: {default})"
        )
    serve.add_argument("--tls-cert", type=Path, metavar="PEM", help="certificate; with --tls-key, the server speaks HTTPS")
    serve.add_argument("--tls-key", type=Path, metavar="PEM", help="key of the certificate")
    serve.add_argument(
        "--drain-seconds", type=float, default=30, metavar="S", help="time to finish when told to stop (default: %(default)s)"
    )
    serve.add_argument(
        "--drain-notice-seconds",
        type=float,
        default=0,
        metavar="S",
        help="/ready says no for so long before the server stops listening (default: %(default)s)",
    )


def _serve(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from ropewalk.config.mail import configured_mail
    from ropewalk.config.serving import Serving, read_serving
    from ropewalk.server.serve import serve
    from ropewalk.server.settings import ServerSettings
    from ropewalk.tenants.commands import parse_count, parse_size

    serving = _written_by(arguments, read_serving(arguments.models) if arguments.models else Serving())
    return serve(
        settings_of(arguments, max_file_bytes=round(arguments.max_file_mb * 1_000_000)),
        ServerSettings(
            host=arguments.host,
            port=arguments.port,
            tls_cert=arguments.tls_cert,
            tls_key=arguments.tls_key,
            requests_per_minute=arguments.requests_per_minute,
            drain_seconds=arguments.drain_seconds,
            drain_notice_seconds=arguments.drain_notice_seconds,
            mail=configured_mail(arguments.mail),
            jobs_at_once=max(0, arguments.jobs),
            jobs_running=_number(arguments.jobs_running, parse_count),
            jobs_queued=_number(arguments.jobs_queued, parse_count),
            jobs_file_bytes=_number(arguments.jobs_file_bytes, parse_size),
            serving=replace(serving, preload=(*serving.preload, *arguments.preload)),
        ),
    )


def _number(text: str, parse: Callable[[str], int | None]) -> int:
    """A limit that everybody has who has none of his own."""
    found = parse(text)
    return sys.maxsize if found is None else found


def _written_by(arguments: argparse.Namespace, serving: Serving) -> Serving:
    """With or without a vLLM server, as the flags say, else as the file does."""
    from dataclasses import replace

    from ropewalk.config.serving import Vllm, wrong_address
    from ropewalk.errors import BadInput

    url, base = arguments.vllm_url, arguments.vllm_base
    if arguments.engine == "own" or not (arguments.engine or url or base):
        if url or base:
            raise BadInput("--vllm-url and --vllm-base are of --engine vllm")
        return replace(serving, vllm=None) if arguments.engine else serving
    if url is not None and (why := wrong_address(url)) is not None:
        raise BadInput(f"--vllm-url: {why}")
    if url is None and serving.vllm is None:
        raise BadInput(
            "--engine vllm needs the server's address: --vllm-url http://gpu:8000, or the block vllm in the file of models"
        )
    found = serving.vllm or Vllm(url)
    return replace(serving, vllm=replace(found, url=url or found.url, base=base or found.base))
