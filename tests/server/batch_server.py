"""`python batch_server.py DATA PORT`: a server that answers one request of a batch at a time, and whose leases are short."""

import sys
from pathlib import Path

from ropewalk.config.serving import EngineOptions, Serving
from ropewalk.files.settings import Settings
from ropewalk.server.serve import serve
from ropewalk.server.settings import ServerSettings

if __name__ == "__main__":
    serving = Serving(engine=EngineOptions(threads=1))
    settings = ServerSettings(port=int(sys.argv[2]), serving=serving, batch_requests=1, batch_lease_seconds=1.0)
    sys.exit(serve(Settings(data=Path(sys.argv[1])), settings))
