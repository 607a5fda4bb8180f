"""`python fake_train_on_ray.py run.yml --granted`: what `ropewalk train` is for a run on Ray, whose workers train as fake_train.py does."""

import sys
from pathlib import Path

from ropewalk.errors import RopewalkError
from ropewalk.files.granted import accept
from ropewalk.jobs.cluster import train_on_ray
from ropewalk.jobs.launch import job_launch

if __name__ == "__main__":
    granted = accept(sys.stdin.buffer)
    fake = str(Path(__file__).with_name("fake_train.py"))
    try:
        sys.exit(train_on_ray(job_launch(Path(sys.argv[1]), granted, arguments=(fake,))))
    except RopewalkError as error:
        print(f"ropewalk: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
