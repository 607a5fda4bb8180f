"""The arguments of `serve`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ropewalk.verbs import Verbs, add_verb, settings_of, store_arguments


def add_verbs(verbs: Verbs) -> None:
    """`serve`."""
    serve = add_verb(verbs, "serve", "the API and its pages, on one port", "ropewalk serve --port 8700", _serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, for this machine only)")
    serve.add_argument("--port", type=int, default=8700, help="0: any free one (default: %(default)s)")
    store_arguments(serve)
    serve.add_argument(
        "--models", type=Path, metavar="YAML", help="which models are served, and how (default: all that are published)"
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

    serving = read_serving(arguments.models) if arguments.models else Serving()
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
            serving=replace(serving, preload=(*serving.preload, *arguments.preload)),
        ),
    )
