"""`python second_server.py DATA DATABASE_URL BLOBS PORT`: another server of an installation, whose leases are short."""

import sys
from pathlib import Path

from ropewalk.config.serving import EngineOptions, Serving
from ropewalk.files.settings import Settings
from ropewalk.server.serve import serve
from ropewalk.server.settings import ServerSettings

if __name__ == "__main__":
    data, database_url, blobs, port = sys.argv[1:]
    serving = Serving(engine=EngineOptions(threads=1))
    settings = ServerSettings(port=int(port), serving=serving, job_lease_seconds=2.0, batch_lease_seconds=2.0)
    sys.exit(serve(Settings(data=Path(data), database_url=database_url, blobs=blobs), settings))
